"""`clip_scoring`: 1,000 images scored against their texts, ours and one by one.

The images lie in a store as PNGs, as the sampler leaves them, and both sides open each. The texts
are those of the starter suite, which four variants and four seeds share. Ours is what the asset
runs: it loads the model, which is counted on our side alone, and keeps every embedding and cosine
in the store; `.worker` is the worker by itself, called on batches of images that threads open and
prepare. The peer calls `CLIPModel` with its processor for one pair after the other; where
torchmetrics runs with the installed transformers, its `clip_score` is a second one. Cosines are
compared.

The model is the starter scorer on a CPU. A second comparison, `clip_scoring.vit_b32`, has random
weights of the size of CLIP ViT-B/32: there the arithmetic is what takes the time.

On a GPU the model is of the size of ViT-L/14, both sides compute in bf16, and `.worker` is what is
held against the bar: to load so large a model takes as long as to ask it. `clip_scoring_gpu.fp32`
is the same in fp32, as the profiles have it. So that a GPU's time suffices, the peers take some of
the pairs there, half of them before ours and half after, and everything is measured once.
`--rehearse` runs those lines on a small model and whatever device there is, so that the command is
known to work.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from benchmarks.rows import Row
from posterpipe.core.devices import best_device, torch_dtype
from posterpipe.core.metrics.clip import ClipTextSimilarity, clip_t_scores, cosines
from posterpipe.core.models import locate
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import NoProgress
from posterpipe.core.prompts import load_suite
from posterpipe.core.store import Store
from posterpipe.setting_types import Precision
from posterpipe.settings import ModelRef, ScorerSettings, load_settings
from posterpipe.starter.render import render
from posterpipe.starter.world import sample_scene

PAIRS = 1_000
FEW_PAIRS = 200
"""Of the comparison of real size."""
ROUNDS = 3
"""Of the comparison that has a bar, on a CPU."""
FP32_PEER_PAIRS = 300
"""Of the peer on a GPU, in the precision that has no bar: it takes 26 ms a pair there."""
PRECISION = {"fp32": 1e-4, "bf16": 0.02}
"""Within which cosines have to be equal: bf16 keeps three digits, and rounds each batch in its own
way."""


def run(pairs: int = PAIRS, few: int = FEW_PAIRS, *, rehearse: bool = False) -> list[Row]:
    """On the CPU, or on the GPU where there is one."""
    if rehearse or best_device().type == "cuda":
        return _on_gpu(pairs, rehearse)
    settings = load_settings("starter")
    rows = measure("clip_scoring", locate(settings.scorer.model, settings.root), pairs, (64, 96), 4)
    with tempfile.TemporaryDirectory() as folder:
        model = build_vit_b32(Path(folder) / "vit_b32")
        rows += measure("clip_scoring.vit_b32", model, few, (512, 512), None)
    return rows


def _on_gpu(pairs: int, rehearse: bool) -> list[Row]:
    """In bf16, which has the bar, and in fp32."""
    from posterpipe_tests.real_size import build_clip_large

    with tempfile.TemporaryDirectory() as folder:
        if rehearse:
            settings = load_settings("starter")
            model, pairs = locate(settings.scorer.model, settings.root), 8
        else:
            model = build_clip_large(Path(folder) / "vit_l14")
        size, name = (512, 512), "clip_scoring_gpu"
        rows = measure(name, model, pairs, size, 10, precision="bf16", bar_on="worker", rounds=1)
        few = min(pairs, FP32_PEER_PAIRS)
        return rows + measure(f"{name}.fp32", model, pairs, size, None, peer_pairs=few)


@dataclass(frozen=True)
class Pairs:
    """Images in a store, each with its text."""

    generations: pd.DataFrame
    store: Store

    def first(self, count: int) -> Pairs:
        return Pairs(self.generations[:count], self.store)

    def last(self, count: int) -> Pairs:
        return Pairs(self.generations[len(self.generations) - count :], self.store)

    def each(self) -> list[tuple[Path, str]]:
        table = self.generations
        return [
            (self.store.root / path, text)
            for path, text in zip(table["image_path"], table["score_text"], strict=True)
        ]


def measure(
    name: str,
    model: Path,
    count: int,
    size: tuple[int, int],
    required: float | None,
    *,
    precision: Precision = "fp32",
    bar_on: str = "ours",
    peer_pairs: int | None = None,
    rounds: int = ROUNDS,
) -> list[Row]:
    """Both sides with one model; `size` is that of the images, width and height. `required` is
    asked of `bar_on`. peer_pairs: how many of the pairs a peer takes, all by default."""
    scorer = ScorerSettings(model=ModelRef(id=str(model)), precision=precision)
    rounds = rounds if required else 1
    peer_pairs = peer_pairs or count
    with tempfile.TemporaryDirectory() as folder:
        # A store a round: what is kept in one is not computed again.
        stores = [draw_pairs(Store(Path(folder) / "0"), count, size)]
        for number in range(1, rounds):
            shutil.copytree(stores[0].store.root, Path(folder) / str(number))
            stores.append(Pairs(stores[0].generations, Store(Path(folder) / str(number))))
        pairs = stores[0]
        one_by_one = OneByOne(model, precision)
        peers: dict[str, Callable[[Pairs], list[float]]] = {"transformers": one_by_one}
        reason = ""
        try:
            torchmetrics = TorchMetrics(one_by_one)
            torchmetrics(pairs.first(1))
            peers["torchmetrics"] = torchmetrics
        except Exception as error:  # whatever it is: it does not run, and that is what is told
            reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        sides: dict[str, Callable[[Pairs], list[float]]] = {
            "ours": Asset(scorer, model),
            "worker": Batches(scorer, model),
            **peers,
        }
        for side in ("worker", *peers):
            sides[side](pairs.first(2))
        half = peer_pairs // 2
        taken: dict[str, list[float]] = {side: [] for side in sides}
        found: dict[str, list[float]] = {}

        def turn(side: str, part: Pairs) -> tuple[float, list[float]]:
            started = time.perf_counter()
            values = sides[side](part)
            return time.perf_counter() - started, values

        for pairs in stores:
            before = {side: turn(side, pairs.first(half)) for side in peers}
            for side in ("ours", "worker"):
                lasted, found[side] = turn(side, pairs)
                taken[side].append(lasted)
            for side, (first, values) in before.items():
                second, others = turn(side, pairs.last(peer_pairs - half))
                taken[side].append(first + second)
                found[side] = values + others
        ms = {
            side: 1000 * statistics.median(lasted) / (peer_pairs if side in peers else count)
            for side, lasted in taken.items()
        }
    bar = f"at least {required:g} times as fast" if required else ""
    unit = f"ms a pair of {count:,}" + ("" if precision == "fp32" else f" ({precision})")
    compared = [(name, "ours", "transformers"), (f"{name}.worker", "worker", "transformers")]
    compared += [(f"{name}.{peer}", "ours", peer) for peer in peers if peer != "transformers"]
    rows = [
        Row(
            row, unit, _rounded(ms[ours]), _rounded(ms[peer]), f"{peer}, one by one",
            round(ms[peer] / ms[ours], 2), bar if ours == bar_on else "",
        )
        for row, ours, peer in compared
    ]  # fmt: skip
    both = [*found["ours"][:half], *found["ours"][count - (peer_pairs - half) :]]
    apart = np.abs(np.array(both) - np.array(found["transformers"])).max()
    # On a GPU the row below tells it, and what it cost to measure is not lost.
    if apart > PRECISION[precision] and best_device().type == "cpu":
        raise RuntimeError(
            f"{name}: cosines differ by {apart:.2g}: the two sides do not do the same work, so "
            "their times say nothing"
        )
    rows.append(
        Row(
            f"{name}.difference", "of the cosine at most", float(f"{apart:.2g}"),
            required=f"at most {PRECISION[precision]:g}",
        )
    )  # fmt: skip
    if reason:
        rows.append(
            Row(
                f"{name}.torchmetrics",
                f"does not run ({reason.replace(str(model), 'the model')[:80]})",
                None,
            )
        )
    return rows


class Batches:
    """Our worker, made once and called on batches; the next images are opened and prepared
    meanwhile, as the asset does."""

    def __init__(self, scorer: ScorerSettings, model: Path) -> None:
        self.worker = ClipTextSimilarity(scorer, model.parent)

    def __call__(self, pairs: Pairs) -> list[float]:
        """Cosines, in the order of the pairs."""
        size = self.worker.settings.batch_size
        paths, texts = zip(*pairs.each(), strict=True)
        prepared = parallel_map(lambda path: self.worker.prepare(_opened(path)), paths, ahead=size)
        found: list[float] = []
        for start in range(0, len(paths), size):
            images = self.worker.prepared_features(list(islice(prepared, size)))
            found += map(float, cosines(images, self.worker.text_features(texts[start:][:size])))
        return found


class Asset:
    """As the asset scores: the model is loaded, embeddings and cosines are kept in the store."""

    def __init__(self, scorer: ScorerSettings, model: Path) -> None:
        self.scorer, self.root = scorer, model.parent

    def __call__(self, pairs: Pairs) -> list[float]:
        table, store = pairs.generations, pairs.store
        scores = clip_t_scores(store, table, self.scorer, self.root, NoProgress())
        return [float(value) for value in scores["value"]]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


class OneByOne:
    """Processor and `CLIPModel` for one pair after the other, as their documentation shows."""

    def __init__(self, model: Path, precision: Precision) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

        self.device = best_device()
        self.processor = CLIPProcessor(
            image_processor=CLIPImageProcessorPil.from_pretrained(model),
            tokenizer=CLIPTokenizer.from_pretrained(model),
        )
        self.model: Any = CLIPModel.from_pretrained(model, dtype=torch_dtype(precision))
        self.model.eval().to(self.device)

    def __call__(self, pairs: Pairs) -> list[float]:
        """Cosines, in the order of the pairs."""
        found = []
        for path, text in pairs.each():
            inputs = self.processor(
                text=[text], images=_opened(path), return_tensors="pt", padding=True,
                truncation=True,
            ).to(self.device)  # fmt: skip
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            with torch.inference_mode():
                output = self.model(**inputs)
                cosine = output.logits_per_image / self.model.logit_scale.exp()
            found.append(float(cosine))
        return found


class TorchMetrics:
    """`torchmetrics.multimodal.CLIPScore`, one pair after the other; raises where it does not run.

    Its score is 100 * max(cosine, 0).
    """

    def __init__(self, peer: OneByOne) -> None:
        from torchmetrics.multimodal import CLIPScore

        # It knows OpenAI's models by name; any other is given ready-made.
        self.metric: Any = CLIPScore(model_name_or_path=lambda: (peer.model, peer.processor))
        self.metric.to(best_device())

    def __call__(self, pairs: Pairs) -> list[float]:
        found = []
        for path, text in pairs.each():
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            self.metric.reset()
            self.metric.update(pixels.to(best_device()), text)
            found.append(float(self.metric.compute()) / 100)
        return found


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def draw_pairs(store: Store, count: int, size: tuple[int, int]) -> Pairs:
    """`count` drawn posters in the store, each beside a text of the starter suite."""
    from posterpipe.core.images import png_bytes

    settings = load_settings("starter")
    suite = load_suite(settings.path(settings.prompt_suite))
    rows = []
    for number in range(count):
        scene = sample_scene(np.random.default_rng(number), style="poster")
        blob = store.put(png_bytes(render(scene, *size, supersample=1)), ".png")
        rows.append(
            {
                "generation_key": f"image {number}",
                "image": blob,
                "image_path": store.path(blob, ".png").relative_to(store.root).as_posix(),
                "score_text": suite[number % len(suite)].score_text,
                "status": "ok",
                "reason": "",
            }
        )
    return Pairs(pd.DataFrame(rows), store)


def build_vit_b32(folder: Path) -> Path:
    """Random weights of CLIP ViT-B/32, from the parameters that its authors published."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from posterpipe_tests.real_size import build_clip_tokenizer

    tokenizer = build_clip_tokenizer(folder, pad_token="<|endoftext|>")
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={"vocab_size": 49408, "projection_dim": 512, **ends},
                vision_config={"patch_size": 32, "projection_dim": 512},
                projection_dim=512,
            )
        )
    model.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder
