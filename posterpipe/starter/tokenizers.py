"""The starter models' vocabularies: a BPE for CLIP and a WordPiece for BLIP, learnt on captions.

Small, because the real CLIP vocabulary alone would hold more weights than the starter U-Net.
Unknown words are spelt in pieces, so nothing that people type is refused.

What belongs here: learning the two vocabularies and writing them as tokenizers. What does not: the
captions that they are learnt on (`captions`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posterpipe.starter.architectures import TEXT_TOKENS
from posterpipe.starter.captions import caption, describe
from posterpipe.starter.world import sample_scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPTIONS = 20_000
SEED = 11


def _corpus() -> Iterator[str]:
    rng = np.random.default_rng(SEED)
    for index in range(CAPTIONS):
        scene = sample_scene(rng)
        yield describe(scene) if index % 3 == 0 else caption(scene, rng)


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """`CLIPTokenizer` with a byte-level BPE of at most 1,400 pieces, 48 tokens a text."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer().train_new_from_iterator(_corpus(), vocab_size=1400)
    tokenizer.model_max_length = TEXT_TOKENS
    return tokenizer


def clip_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }


def blip_tokenizer() -> PreTrainedTokenizerBase:
    """`BertTokenizer` with a WordPiece of at most 1,000 pieces and BLIP's [DEC] start token."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer().train_new_from_iterator(
        _corpus(), vocab_size=1000, new_special_tokens=["[DEC]"]
    )
    tokenizer.model_max_length = TEXT_TOKENS
    return tokenizer


def blip_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {
        "bos": tokenizer.convert_tokens_to_ids("[DEC]"),
        "sep": tokenizer.sep_token_id,
        "pad": tokenizer.pad_token_id,
    }


def save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`tokenizer.json` and the separate vocabulary files that older readers expect."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def image_processor(name: str, side: int) -> Any:
    """A PIL image processor of transformers for square images of `side` pixels."""
    import transformers

    size: dict[str, int] = {"shortest_edge": side}
    if name.startswith("Blip"):
        size = {"height": side, "width": side}
        return getattr(transformers, name)(
            size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
        )
    return getattr(transformers, name)(
        size=size,
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )
