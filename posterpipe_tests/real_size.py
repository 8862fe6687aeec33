"""Models of the real size with random weights: `python -m posterpipe_tests.real_size FOLDER`.

What belongs here: all models of the profile `sd21`: Stable Diffusion 2.1 (768 px, v-prediction)
and its base (512 px, epsilon), BLIP-large, CLIP ViT-L/14 and DINOv2-base, built from the parameters
that their authors published, in the layout of the hub, with tokenizers of the real size. They know
nothing; they show that what works with the starter models works at this size, and how fast. What
does not: tiny models (`models`), trained ones (`data/models/starter`).

About 7 GB for all of them, in fp16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CLIP_VOCABULARY = 49408
CLIP_TOKENS = 77
BERT_VOCABULARY = 30524
"""BERT's 30,522 and BLIP's [DEC] and [ENC]."""

START, END = "<|startoftext|>", "<|endoftext|>"


def build_clip_tokenizer(folder: Path, *, pad_token: str) -> CLIPTokenizer:
    """A byte-level BPE of 49,408 tokens, as CLIP's: 256 bytes, each also at a word's end, 48,894
    merges, start and end. The merges are pairs of letters and then of pairs, in a fixed order."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    merges: list[tuple[str, str]] = []
    pieces = list(letters)
    ends = [letter + "</w>" for letter in letters]
    wanted = CLIP_VOCABULARY - len(vocab) - 2
    grown = itertools.chain(
        itertools.product(pieces, ends),
        itertools.product(pieces, pieces),
        itertools.product((a + b for a, b in itertools.product(letters, letters)), pieces),
        itertools.product((a + b for a, b in itertools.product(letters, letters)), ends),
        itertools.product(
            (a + b for a, b in itertools.product(letters, letters)),
            (a + b for a, b in itertools.product(letters, letters)),
        ),
    )
    for left, right in grown:
        if len(merges) == wanted:
            break
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
    for special in (START, END):
        vocab[special] = len(vocab)
    assert len(vocab) == CLIP_VOCABULARY
    pairs: Any = merges
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=pairs, model_max_length=CLIP_TOKENS, pad_token=pad_token
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_bert_tokenizer(folder: Path) -> None:
    """A WordPiece vocabulary of 30,524 tokens, as BLIP's."""
    from transformers import BertTokenizer

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    signs = [chr(code) for code in range(33, 127)]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = itertools.chain(
        (f"##{sign}" for sign in signs),
        ("".join(word) for word in itertools.product(letters, repeat=2)),
        (f"##{''.join(word)}" for word in itertools.product(letters, repeat=2)),
        ("".join(word) for word in itertools.product(letters, repeat=3)),
        (f"##{''.join(word)}" for word in itertools.product(letters, repeat=3)),
    )
    vocabulary = list(dict.fromkeys([*specials, *signs]))
    known = set(vocabulary)
    for word in words:
        if len(vocabulary) == BERT_VOCABULARY - 2:
            break
        if word not in known:
            known.add(word)
            vocabulary.append(word)
    vocabulary += ["[DEC]", "[ENC]"]
    assert len(vocabulary) == BERT_VOCABULARY
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    tokenizer = BertTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, do_lower_case=True
    )
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.save_pretrained(folder)


def build_stable_diffusion(
    folder: Path, *, base: bool, precision: Literal["fp16", "fp32"] = "fp16", seed: int = 0
) -> Path:
    """Stable Diffusion 2.1, or with `base` the 512 px model: 866 M parameters in the U-Net, 340 M
    in OpenCLIP's ViT-H text encoder, 84 M in the VAE. Returns `folder`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = _random(
        lambda: UNet2DConditionModel(
            sample_size=64 if base else 96,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
            upcast_attention=not base,
        ),
        seed,
    )
    _save(unet, folder / "unet", precision)
    del unet
    vae = _random(
        lambda: AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512 if base else 768,
            scaling_factor=0.18215,
        ),
        seed,
    )
    _save(vae, folder / "vae", precision)
    del vae
    build_clip_tokenizer(folder / "tokenizer", pad_token="!")
    text_encoder = _random(
        lambda: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=CLIP_VOCABULARY,
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,  # of ViT-H's 24, as published
                num_attention_heads=16,
                max_position_embeddings=CLIP_TOKENS,
                hidden_act="gelu",
                projection_dim=512,
                bos_token_id=CLIP_VOCABULARY - 2,
                eos_token_id=CLIP_VOCABULARY - 1,
                pad_token_id=1,
            )
        ),
        seed,
    )
    _save(text_encoder, folder / "text_encoder", precision)
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "DDIMScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon" if base else "v_prediction",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "trained_betas": None,
        },
    )
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.42.1",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return folder


def build_blip_large(folder: Path, *, seed: int = 0) -> Path:
    """BLIP-large for captions: ViT-L/16 at 384 px and a decoder of 12 layers, 470 M parameters."""
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipTextConfig,
        BlipVisionConfig,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    text = BlipTextConfig(
        vocab_size=BERT_VOCABULARY,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        bos_token_id=BERT_VOCABULARY - 2,
        eos_token_id=3,
        pad_token_id=0,
        sep_token_id=3,
    )
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=384,
        patch_size=16,
        initializer_range=0.02,  # BLIP's own default of 1e-10 is nothing at all in fp16
    )
    config = BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=512
    )
    model = _random(lambda: BlipForConditionalGeneration(config), seed)
    _save(model, folder)
    build_bert_tokenizer(folder)
    BlipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder


def build_clip_large(folder: Path, *, seed: int = 0) -> Path:
    """CLIP ViT-L/14 at 224 px: 428 M parameters."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = CLIPConfig(
        text_config={
            "vocab_size": CLIP_VOCABULARY,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": CLIP_TOKENS,
            "projection_dim": 768,
            "bos_token_id": CLIP_VOCABULARY - 2,
            "eos_token_id": CLIP_VOCABULARY - 1,
        },
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "projection_dim": 768,
        },
        projection_dim=768,
    )
    _save(_random(lambda: CLIPModel(config), seed), folder)
    build_clip_tokenizer(folder, pad_token=END)
    CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    ).save_pretrained(folder)
    return folder


def build_dinov2_base(folder: Path, *, seed: int = 0) -> Path:
    """DINOv2-base: ViT-B/14, 87 M parameters, made for 518 px and read at 224."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=518,
        patch_size=14,
    )
    _save(_random(lambda: Dinov2Model(config), seed), folder)
    BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
    ).save_pretrained(folder)
    return folder


def _random(build: Callable[[], Any], seed: int) -> Any:
    import torch

    from posterpipe.core.devices import best_device

    # A GPU draws gigabytes of random numbers in no time, a CPU in half a minute.
    with torch.random.fork_rng(), best_device():
        torch.manual_seed(seed)
        return build()


def _save(model: Any, folder: Path, precision: Literal["fp16", "fp32"] = "fp16") -> None:
    model = model.half() if precision == "fp16" else model
    model.save_pretrained(folder, safe_serialization=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "stable-diffusion-2-1": lambda folder: build_stable_diffusion(folder, base=False),
    "stable-diffusion-2-1-base": lambda folder: build_stable_diffusion(folder, base=True),
    "blip-image-captioning-large": build_blip_large,
    "clip-vit-large-patch14": build_clip_large,
    "dinov2-base": build_dinov2_base,
}
"""By the name on the hub."""


def build(name: str, folder: Path) -> Path:
    """The model `name` below `folder`, built unless it is there."""
    model = folder / name
    if not model.exists():
        unfinished = folder / f".{name}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        os.replace(BUILDERS[name](unfinished), model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the models go, one folder each")
    parser.add_argument("--only", choices=BUILDERS, help="one of them; all when left out")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else BUILDERS:
        print(f"building {name} ...", flush=True)
        print(build(name, arguments.folder))


if __name__ == "__main__":
    main()
