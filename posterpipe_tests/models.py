"""Tiny random models of the real classes, for tests that need a model and not what it knows.

What belongs here: functions that write a model directory as `from_pretrained` reads it, and the
cache in which the Hugging Face hub's models lie. What does not: anything trained (that is
`data/models/starter`), fixtures of one test file.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TINY_WIDTH, TINY_HEIGHT = 32, 48
TINY_TOKENS = 48
START, END = "<|startoftext|>", "<|endoftext|>"
_SMALL = ("a", "animated", "blue", "cat", "centre", "film", "in", "minimalist", "movie", "of", "on")
WORDS = (*_SMALL, "one", "only", "poster", "red", "rocket", "spaceship", "the", "titled", "with")


@dataclass(frozen=True)
class HubCache:
    """A folder as huggingface_hub keeps what it downloaded (its `HF_HUB_CACHE`)."""

    folder: Path

    def add(self, name: str, commit: str, model: Path) -> Path:
        """A copy of `model` as the snapshot of `owner/name` at `commit`, where `main` is now."""
        cached = self.folder / f"models--{name.replace('/', '--')}"
        snapshot = cached / "snapshots" / commit
        shutil.copytree(model, snapshot)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(commit)
        return snapshot


def build_tiny_tokenizer(*, max_tokens: int = TINY_TOKENS) -> CLIPTokenizer:
    """A byte-level BPE `CLIPTokenizer`: any text can be encoded, the words above as one token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[(pieces[0], pieces[1])] = None
            pieces[:2] = [pieces[0] + pieces[1]]
            vocab.setdefault(pieces[0], len(vocab))
    for special in (START, END):
        vocab[special] = len(vocab)
    pairs: Any = list(merges)  # annotated as strings, and wanted as pairs
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=max_tokens)


def build_tiny_stable_diffusion(
    folder: Path,
    *,
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction",
    precision: Literal["fp32", "fp16"] = "fp16",
    latent_channels: int = 12,
    seed: int = 0,
) -> Path:
    """Writes a random `StableDiffusionPipeline` directory of about 0.3 M parameters.

    Made for images of 32 x 48 pixels (width x height; any multiple of 16 works) and captions of
    48 tokens; cosine noise as the starter model's. Safetensors only, deterministic in `seed`.
    Load it with an explicit `torch_dtype`: without one, transformers keeps the fp16 of the file
    and diffusers does not, and the two halves do not fit together. Returns `folder`.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=latent_channels,
            block_out_channels=(8, 8, 8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=TINY_HEIGHT,
        )
        unet = UNet2DConditionModel(
            sample_size=(TINY_HEIGHT // 8, TINY_WIDTH // 8),
            in_channels=latent_channels,
            out_channels=latent_channels,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=(1, 2),
            norm_num_groups=8,
            use_linear_projection=True,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TINY_TOKENS,
                hidden_act="gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    if precision == "fp16":
        models: list[Any] = [vae, unet, text_encoder]
        for model in models:
            model.half()
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(
            num_train_timesteps=1000,
            beta_schedule="squaredcos_cap_v2",
            prediction_type=prediction_type,
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
