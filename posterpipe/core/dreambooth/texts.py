"""What captions say to the U-Net.

What belongs here: tokens, and the text encoder's hidden states, kept where they cannot change. What
does not: which caption is trained when (`draws`), files and keys in general (`cache`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from posterpipe.core.devices import whole_fp32
from posterpipe.core.dreambooth.base_model import load_tokenizer
from posterpipe.core.dreambooth.batches import to_device
from posterpipe.core.dreambooth.cache import Tensors, cached_tensors, key_of
from posterpipe.core.dreambooth.config import hash_files

_EMBEDDINGS_VERSION = 1
"""Raised when the same text would give other hidden states; part of every key."""

# Shuffled captions come in ever new orders; more than so many answers are not kept.
_KEPT_AT_MOST = 4096


class Tokens:
    """Texts as token ids, each text tokenized once.

    Raises BaseModelError when the tokenizer cannot be loaded.
    """

    def __init__(self, base_model: Path) -> None:
        self._tokenizer = load_tokenizer(base_model)
        config = json.loads((base_model / "text_encoder" / "config.json").read_text("utf-8"))
        longest = int(config.get("max_position_embeddings", 77))
        self.length = min(int(self._tokenizer.model_max_length), longest)
        self._of = lru_cache(maxsize=_KEPT_AT_MOST)(self._tokenize)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 (texts, tokens), cut so that the end token stays, and padded."""
        return torch.tensor([self._of(text) for text in texts])

    def too_long(self, texts: Iterable[str]) -> list[str]:
        """Those of the texts that are cut, in order of the alphabet."""
        return [
            text
            for text in sorted(texts)
            if len(self._tokenizer(text, padding=False, truncation=False).input_ids) > self.length
        ]

    def _tokenize(self, text: str) -> list[int]:
        encoded = self._tokenizer(
            text, padding="max_length", truncation=True, max_length=self.length
        )
        return list(encoded.input_ids)


class TrainedTexts:
    """Texts go through the encoder at each call, with gradients.

    encode: the encoder as it is trained, token ids int64 (texts, tokens) in, tuple with the hidden
    states first out.
    """

    def __init__(
        self, encode: Callable[..., Sequence[Tensor]], tokens_of: Tokens, device: torch.device
    ) -> None:
        self._encode = encode
        self._tokens_of = tokens_of
        self._device = device

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Hidden states (texts, tokens, width)."""
        return self._encode(to_device(self._tokens_of(texts), self._device))[0]


class FrozenTexts:
    """Texts go through the encoder once, in fp32, and the answers are kept.

    Each text alone: how a batch is made up shows in the last digits, and a resumed run has to see
    the same ones. `load` gives the encoder, in fp32 on `device`; it is not called while all texts
    are known. dtype: of the answers, the type in which the U-Net computes. expected: texts that are
    all made known when the first one is asked for, after which the encoder is let go of.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        tokens_of: Tokens,
        device: torch.device,
        dtype: torch.dtype,
        expected: Collection[str] = (),
    ) -> None:
        self._load = load
        self._tokens_of = tokens_of
        self._device = device
        self._dtype = dtype
        self._expected = expected
        self._encoder: nn.Module | None = None
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Hidden states (texts, tokens, width) on the device, without gradients."""
        if self._expected:
            self._known = {text: self._compute(text) for text in self._expected}
            self._expected, self._encoder = (), None
        states = []
        for text in texts:
            state = self._known.get(text)
            if state is None:
                state = self._compute(text)
                if len(self._known) < _KEPT_AT_MOST:
                    self._known[text] = state
            states.append(state)
        return to_device(torch.stack(states), self._device)

    def learn(
        self, texts: Sequence[str], folder: Path, encoder_key: str, *, log: Callable[[str], None]
    ) -> None:
        """Makes texts known, from `folder` where they are there, and lets go of the encoder.

        The key holds the encoder's and the tokenizer's files (`encoder_key`), the text's token ids,
        the precision, the kind of device, and the versions of torch, transformers and this code.
        """
        distinct = list(dict.fromkeys(texts))
        where = (str(self._dtype), self._device.type, torch.__version__, transformers.__version__)
        versions = (_EMBEDDINGS_VERSION, encoder_key, *where)
        keys = [key_of(*versions, ids) for ids in self._tokens_of(distinct).tolist()]

        def compute(missing: list[int]) -> Iterator[tuple[int, Tensors]]:
            for index in missing:
                yield index, {"hidden_states": self._compute(distinct[index])}
            log(f"encoded {len(missing)} captions")

        values = cached_tensors(folder, keys, compute, log=log)
        self._known = {
            text: value["hidden_states"] for text, value in zip(distinct, values, strict=True)
        }
        self._encoder = None

    @torch.no_grad()
    def _compute(self, text: str) -> Tensor:
        with whole_fp32(), torch.autocast(self._device.type, enabled=False):
            if self._encoder is None:
                self._encoder = self._load()
            self._encoder.eval()
            state = self._encoder(self._tokens_of([text]).to(self._device))[0][0]
        return state.to(self._dtype).cpu()


def encoder_key(base_model: Path) -> str:
    """Hash of the text encoder's and the tokenizer's files."""
    return hash_files(base_model, "text_encoder/*", "tokenizer/*")
