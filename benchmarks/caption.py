"""`caption`: posters into captions, against the loop that the thesis ran, one poster at a time.

Both sides open the same JPEG posters of 1400x2100 pixels and give each a caption with the same
model and the same beam search (3 beams, no trigram twice, 20 tokens, about what BLIP says of a
picture). The model has BLIP's size and random weights, which never end a caption early, so both
sides always decode all 20 tokens. The peer computes in fp32, as the thesis did, on a GPU in our
precision as well; we in the precision that `captioner.precision: auto` chooses. The peer describes
the first half of the posters, then we describe all, then the peer the other half, so that noise
meets both alike; loading the model is not counted. On a GPU the peer describes 24 of them in each
precision, which is what a GPU's time suffices for, and times are those of an image.

Captions are compared with those of the peer in fp32: `caption.same` is the share of posters that
got the same words, and `caption.score_loss` by how much less likely (nats a token, in fp32) ours
are on average; on a GPU beside what the peer loses in our precision.

`python -m benchmarks.caption --device cuda` runs BLIP-large on a GPU; `--posters` sets how many.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.rows import Row
from posterpipe.core.captioner import Captioner, caption_files
from posterpipe.core.devices import best_device, torch_dtype
from posterpipe.core.parallel import parallel_map
from posterpipe.settings import CaptionerSettings, ModelRef

POSTER_SIZE = (1400, 2100)
POSTERS = 300
GPU_PEER_POSTERS = 24
TOKENS = 20
BEAMS = 3
NGRAM = 3
VOCABULARY = 30524
GAIN, CONTRAST = 0.55, 5.0
"""Of the random weights: chosen so that images differ in their captions, and rounding is not what
decides between words."""
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


@dataclass(frozen=True)
class Size:
    """Dimensions of a BLIP: its vision tower and its text decoder."""

    name: str
    vision_width: int
    vision_layers: int
    vision_heads: int
    image_size: int = 384
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    words: int = VOCABULARY


BASE = Size("base", 768, 12, 12)
LARGE = Size("large", 1024, 24, 16)
TINY = Size("tiny", 32, 2, 2, image_size=32, text_width=32, text_layers=2, text_heads=2, words=200)
"""For trying the benchmark itself."""


def run() -> list[Row]:
    """On the CPU; where there is a GPU, BLIP-large on it as well."""
    rows = measure(BASE, "cpu", posters=POSTERS, batch_size=32)
    if torch.cuda.is_available():
        rows += measure(LARGE, "cuda", posters=POSTERS, batch_size=64)
    return rows


def measure(size: Size, device: str, *, posters: int, batch_size: int) -> list[Row]:
    """Both sides on the same posters, ours in batches of `batch_size`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model(folder / "blip", size)
        paths = draw_posters(folder / "posters", posters)
        alone = min(posters, GPU_PEER_POSTERS if device == "cuda" else posters)
        return _measure(model, paths, torch.device(device), batch_size, alone)


def _measure(
    model: Path, paths: Sequence[Path], device: torch.device, batch_size: int, alone: int
) -> list[Row]:
    """alone: how many of the posters the peer describes, the first ones and the last ones."""
    settings = CaptionerSettings(
        model=ModelRef(id=str(model)),
        batch_size=batch_size,
        num_beams=BEAMS,
        max_new_tokens=TOKENS,
        no_repeat_ngram_size=NGRAM,
    )
    captioner = Captioner(settings, model.parent, device)
    one_by_one = OneByOne(model, device, torch.float32)
    peers = {"fp32": one_by_one}
    if device.type == "cuda":
        peers[captioner.precision] = OneByOne(model, device, torch_dtype(captioner.precision))
    sides: dict[str, Any] = {
        "ours": lambda block: [row["caption"] for row in caption_files(captioner, block)],
        **{name: peer.captions for name, peer in peers.items()},
    }
    # Not counted: a GPU needs a batch of its size to warm up.
    sides["ours"](paths[: batch_size if device.type == "cuda" else 2])
    for name in peers:
        sides[name](paths[:2])
    first, last = paths[: alone // 2], paths[len(paths) - (alone - alone // 2) :]
    turns = [(name, first) for name in peers]
    turns += [("ours", paths), *((name, last) for name in peers)]
    seconds = dict.fromkeys(sides, 0.0)
    captions: dict[str, list[str]] = {name: [] for name in sides}
    for name, turn in turns:
        started = time.perf_counter()
        captions[name] += sides[name](turn)
        _wait_for(device)
        seconds[name] += time.perf_counter() - started
    each = {name: total / len(captions[name]) for name, total in seconds.items()}
    topic = "caption" if device.type == "cpu" else "caption_gpu"
    required = "peer / ours at least 2.5" if device.type == "cpu" else ""
    rows = []
    for name in peers:
        rows.append(
            Row(
                topic if name == "fp32" else f"{topic}.same_precision",
                f"s an image ({captioner.precision})",
                _rounded(each["ours"]),
                _rounded(each[name]),
                f"one by one, {name}",
                round(each[name] / each["ours"], 2),
                required,
            )
        )
    described = [*first, *last]
    of_path = dict(zip(paths, captions["ours"], strict=True))
    captions["ours"] = [of_path[path] for path in described]
    same = {
        name: float(np.mean([a == b for a, b in zip(texts, captions["fp32"], strict=True)]))
        for name, texts in captions.items()
    }
    losses = {
        name: float(np.mean([*map(one_by_one.loss, described, captions["fp32"], texts)]))
        for name, texts in captions.items()
    }
    short = captioner.precision if captioner.precision in peers else None
    exact = captioner.precision == "fp32"
    rows += [
        Row(f"{topic}.images_per_second", "images/s", _rounded(1 / each["ours"])),
        Row(
            f"{topic}.same",
            f"of 1 ({len(set(captions['fp32']))} distinct captions)",
            round(same["ours"], 3),
            round(same[short], 3) if short else None,
            f"one by one, {short}" if short else "",
            required="at least 0.95, in fp32" if exact else "",
        ),
        Row(
            f"{topic}.score_loss",
            "nats a token",
            round(losses["ours"], 4),
            round(losses[short], 4) if short else None,
            f"one by one, {short}" if short else "",
            required="at most 0.02",
        ),
    ]
    return rows


class OneByOne:
    """The thesis's loop: open a poster, processor, generate, next poster."""

    def __init__(self, model: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import BertTokenizer, BlipForConditionalGeneration
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        self.processor = BlipImageProcessorPil.from_pretrained(model)
        self.tokenizer = BertTokenizer.from_pretrained(model)
        self.device, self.dtype = device, dtype
        self.model: Any = BlipForConditionalGeneration.from_pretrained(model, dtype=dtype)
        self.model.eval().to(device)

    def captions(self, paths: Sequence[Path]) -> list[str]:
        """A caption for each poster."""
        return [self.caption(path) for path in paths]

    def caption(self, path: Path) -> str:
        """The caption of one poster."""
        tokens = self.model.generate(
            pixel_values=self._pixels(path),
            num_beams=BEAMS,
            max_new_tokens=TOKENS,
            no_repeat_ngram_size=NGRAM,
        )
        return str(self.tokenizer.decode(tokens[0], skip_special_tokens=True))

    def loss(self, path: Path, best: str, caption: str) -> float:
        """By how much less likely a caption is than the best one, in nats a token."""
        return 0.0 if caption == best else self.score(path, best) - self.score(path, caption)

    def score(self, path: Path, caption: str) -> float:
        """Mean log-likelihood of a caption's words under this model, in nats a token."""
        words = self.tokenizer(caption, add_special_tokens=False).input_ids
        ids = torch.tensor([[self.model.config.text_config.bos_token_id, *words]])
        ids = ids.to(self.device)
        with torch.inference_mode():
            image_embeds = self.model.vision_model(pixel_values=self._pixels(path))[0]
            logits = self.model.text_decoder(ids, encoder_hidden_states=image_embeds).logits
        likely = logits[0, :-1].float().log_softmax(-1)
        return float(likely.gather(-1, ids[0, 1:, None]).mean())

    def _pixels(self, path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            inputs = self.processor(images=image.convert("RGB"), return_tensors="pt")
        pixels: torch.Tensor = inputs.pixel_values
        return pixels.to(self.device, self.dtype)


def build_model(folder: Path, size: Size) -> Path:
    """Random weights of BLIP's classes in that size, with a vocabulary of made-up words."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = [*SPECIALS, *(f"w{number}" for number in range(size.words - len(SPECIALS)))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIALS}
    config = BlipConfig(
        text_config={
            "hidden_size": size.text_width,
            "intermediate_size": 4 * size.text_width,
            "projection_dim": size.text_width,
            "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.text_heads,
            "hidden_act": "gelu",
            "vocab_size": size.words,
            "encoder_hidden_size": size.vision_width,
            "max_position_embeddings": 512,
            "initializer_range": GAIN / size.text_width**0.5,
            "bos_token_id": ids["[DEC]"],
            "eos_token_id": ids["[SEP]"],
            "sep_token_id": ids["[SEP]"],
            "pad_token_id": ids["[PAD]"],
        },
        vision_config={
            "hidden_size": size.vision_width,
            "intermediate_size": 4 * size.vision_width,
            "projection_dim": size.text_width,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_heads,
            "image_size": size.image_size,
            "patch_size": 16 if size.image_size > 100 else 8,
            "initializer_range": 1 / size.vision_width**0.5,
        },
    )
    with torch.random.fork_rng(), best_device():  # which on a GPU takes no time
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        # So that words differ in likelihood, as they do for a trained model.
        model.text_decoder.bert.embeddings.word_embeddings.weight *= CONTRAST
        # Never the end token, so that every caption has all its tokens on both sides.
        model.text_decoder.cls.predictions.decoder.bias[ids["[SEP]"]] = -1e4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(
        size={"height": size.image_size, "width": size.image_size}
    ).save_pretrained(folder)
    return folder


def draw_posters(folder: Path, count: int) -> list[Path]:
    """JPEG files of soft coloured shapes, each another one."""
    folder.mkdir()

    def draw(number: int) -> Path:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 6, 3), np.uint8))
        path = folder / f"{number:04}.jpg"
        coarse.resize(POSTER_SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
        return path

    return list(parallel_map(draw, range(count)))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    """One size on one device."""
    from benchmarks.__main__ import file, show

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("tiny", "base", "large"))
    parser.add_argument("--posters", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--file",
        action="store_true",
        help="write the figures into benchmarks/results and the pages",
    )
    options = parser.parse_args()
    gpu = options.device == "cuda"
    sizes = {size.name: size for size in (TINY, BASE, LARGE)}
    rows = measure(
        sizes[options.size or ("large" if gpu else "base")],
        options.device,
        posters=options.posters or POSTERS,
        batch_size=options.batch_size or (64 if gpu else 32),
    )
    show(rows)
    if options.file:
        file(rows)


if __name__ == "__main__":
    main()
