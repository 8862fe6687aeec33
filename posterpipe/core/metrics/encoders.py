"""Encoders: images and texts into vectors, and keeping the vectors in the store.

What belongs here: the CLIP and DINO encoders that metrics share, their ids, and the store of
embeddings. What does not: what an encoder sees of an image (`pixels`) and what is computed from
embeddings (`clip`, `specificity`, `fidelity`, `diversity`, `pickscore`).

An image is encoded once by an encoder. Its embedding lies in the store under the image's hash and
the encoder's id, so that a new score text, title, reference poster or metric encodes no image
again; a text's lies under the hash of the text. Features are cast to float32 before they are
brought to length 1.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image

from posterpipe.core.devices import (
    best_device,
    computing_in,
    noticing_a_gone_device,
    torch_dtype,
    usable_precision,
)
from posterpipe.core.errors import first_line
from posterpipe.core.images import UNREADABLE
from posterpipe.core.metrics.pixels import Preparation
from posterpipe.core.models import ModelMissing, fingerprint, locate, quiet_hub
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.core.weights import load_weights
from posterpipe.settings import ScorerSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ENCODER_VERSION = 2
"""Raised when the same weights and preprocessing would give other embeddings."""

_SEEN = {"crop": "crop", "pad": "pad2"}
"""What an encoder sees, with a number that is raised when it sees other pixels. `pad2` shows the
whole image also where a model's own preprocessing cuts the middle out of a larger square."""

T = TypeVar("T")

_KEPT_TEXTS = 4096

_WIDTH = 8
"""Tokens of a text are filled up to a multiple of this, so that short ones stay quick."""

_SAVE_EVERY = 256
"""Embeddings that a kill may lose."""

_CPU_BATCH = 16
"""Images that go through a model at once on a CPU at most: activations then stay in its caches."""

_CPU_TEXTS = 8
"""Texts, of which a suite has few of each length: more would be filled up with repetitions."""


def encoder_id(settings: ScorerSettings, root: Path) -> str:
    """`<preprocessing>.<model>.<fingerprint>`, with the precision where it is not fp32.

    E.g. `pad2.dinov2-base.77b1c03f`. It is the part of a metric's id that names its encoder. The
    precision is the one that this machine computes in, so that numbers of a GPU and a CPU do not
    mix. Loads nothing heavy, but asks torch for a GPU where fp16 is set. Raises ModelMissing when
    the model is not there and cannot be downloaded.
    """
    model = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(settings.model.id).name)
    name = f"{_SEEN[settings.preprocessing]}.{model}.{fingerprint(settings.model, root)[:8]}"
    precision = usable_precision(settings.precision)
    return name if precision == "fp32" else f"{name}.{precision}"


class ImageEncoder(Protocol):
    """What makes embeddings of images. Made once, called on batches."""

    encoder_id: str
    """Names what decides the embeddings: they are kept under it."""

    def prepare(self, image: Image.Image) -> np.ndarray:
        """What the model sees of an image. From any thread."""
        ...

    def prepared_features(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Image embeddings of length 1, float32 (batch, dimension), of what `prepare` gave."""
        ...

    def image_features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Image embeddings of length 1, float32 (batch, dimension)."""
        ...


def image_encoder(settings: ScorerSettings, root: Path) -> ImageEncoder:
    """The encoder of a model, by the `model_type` of its config: CLIP, DINO or DINOv2.

    Raises ModelMissing when the model is not there, or is of another kind.
    """
    if encoder_family(settings, root) == "CLIP":
        return ClipEncoder(settings, root)
    return DinoEncoder(settings, root)


def encoder_family(settings: ScorerSettings, root: Path) -> Literal["CLIP", "DINO"]:
    """Which of the two a model is of, DINOv2 counted to DINO. Raises as `image_encoder` does."""
    folder = locate(settings.model, root)
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise ModelMissing(
            f"{folder / 'config.json'}: cannot be read ({error}); copy the model again"
        ) from error
    if kind == "clip":
        return "CLIP"
    if kind in ("vit", "dinov2", "dinov2_with_registers"):
        return "DINO"
    raise ModelMissing(
        f"{folder}: a model of the kind {kind!r} cannot encode images here; name a CLIP, DINO or "
        "DINOv2 model, such as POSTERPIPE_EVIDENCE__IMAGE_ENCODERS="
        """'[{"id": "facebook/dinov2-base"}]'"""
    )


class _Encoder:
    """What both kinds share: device, precision, batches."""

    model: Any
    image_processor: Any
    dimension: int

    def __init__(self, settings: ScorerSettings, root: Path) -> None:
        from transformers.utils import logging as transformers_logging

        quiet_hub()
        transformers_logging.disable_progress_bar()
        self.settings = settings
        self.encoder_id = encoder_id(settings, root)
        self.folder = locate(settings.model, root)
        self.device: torch.device = best_device()
        # On a GPU the weights themselves are short; on a CPU autocast keeps the norms exact.
        self.precision = usable_precision(settings.precision)
        self.dtype = torch_dtype(self.precision if self.device.type != "cpu" else "fp32")

    def image_features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Image embeddings of length 1, float32 (batch, dimension)."""
        return self.prepared_features([self.prepare(image) for image in images])

    def prepare(self, image: Image.Image) -> np.ndarray:
        """What the model sees of an image: see `Preparation.image`. From any thread."""
        return self._preparation.image(image)

    def prepared_features(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Image embeddings of length 1, float32 (batch, dimension), of what `prepare` gave."""
        size = self._batch(_CPU_BATCH)
        parts = [
            self._features(_filled_up(part, size))[: len(part)] for part in _parts(prepared, size)
        ]
        return np.concatenate([np.zeros((0, self.dimension), np.float32), *parts])

    def _batch(self, on_a_cpu: int) -> int:
        """How many images or texts go through the model at once, neither more nor fewer."""
        size = self.settings.batch_size
        return min(size, on_a_cpu) if self.device.type == "cpu" else size

    @cached_property
    def _preparation(self) -> Preparation:
        return Preparation(self.image_processor, pad=self.settings.preprocessing == "pad")

    def _features(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        import torch

        with (
            self._noticing_a_gone_device(),
            torch.inference_mode(),
            computing_in(self.precision, self.device),
        ):
            pixels = self._preparation.batch(prepared, self.device)
            return unit(self._forward(pixels.to(self.dtype)))

    def _forward(self, pixels: Tensor) -> Tensor:
        """Features (batch, dimension) of normalised pixels (batch, 3, height, width)."""
        raise NotImplementedError

    def _noticing_a_gone_device(self) -> AbstractContextManager[None]:
        return noticing_a_gone_device("the encoder of images and texts", self.device)

    def _load(self, cls: Any, folder: Path | None = None, **arguments: Any) -> Any:
        """`from_pretrained`, its failures in words."""
        folder = folder or self.folder
        with self._failures_in_words(folder):
            return cls.from_pretrained(folder, **arguments)

    @contextmanager
    def _failures_in_words(self, folder: Path) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelMissing(
                f"{folder}: the model cannot be loaded ({first_line(error)}); copy it again, or "
                "name another one: POSTERPIPE_SCORER__MODEL__ID for the score, "
                "POSTERPIPE_EVIDENCE__* for the other metrics"
            ) from error

    def _load_weights(self, cls: Any, dispensable: Sequence[str] = ()) -> Any:
        with self._failures_in_words(self.folder):
            model = load_weights(cls, self.folder, dispensable=dispensable, dtype=self.dtype)
        with self._noticing_a_gone_device():
            return model.requires_grad_(False).eval().to(self.device)


class ClipEncoder(_Encoder):
    """Both towers of a CLIP. Made once, called on batches.

    Equals `CLIPModel` with `CLIPProcessor` (its PIL form) of transformers. `crop` is CLIP's own
    preprocessing: the shorter side to the encoder's size, then the square in the middle, which cuts
    a third of a poster's height away; `pad` puts the whole image on a square of CLIP's mean colour,
    of which nothing is cut.
    `processor`: a directory whose tokenizer and image processor serve, where it is not the model's.
    Raises ModelMissing.
    """

    def __init__(
        self, settings: ScorerSettings, root: Path, *, processor: Path | None = None
    ) -> None:
        import transformers

        from posterpipe.core.metrics.class_token import ClassTokenLayer

        super().__init__(settings, root)
        self.tokenizer: Any = self._load(transformers.CLIPTokenizer, processor)
        # The PIL form by name: torchvision's resize gives other pixels.
        self.image_processor = self._load(transformers.CLIPImageProcessorPil, processor)
        self.model = self._load_weights(transformers.CLIPModel)
        layers = self.model.vision_model.encoder.layers
        layers[-1] = ClassTokenLayer(layers[-1])
        self.dimension = int(self.model.config.projection_dim)
        self.max_tokens = min(
            int(self.tokenizer.model_max_length),
            int(self.model.config.text_config.max_position_embeddings),
        )
        self._texts: dict[str, np.ndarray] = {}

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Text embeddings of length 1, float32 (batch, dimension); each text is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if len(self._texts) + len(new) > _KEPT_TEXTS:
            self._texts.clear()
            new = list(dict.fromkeys(texts))
        if new:
            self._texts.update(zip(new, self._encode(new), strict=True))
        nothing = np.zeros((0, self.dimension), np.float32)
        return np.stack([self._texts[text] for text in texts]) if texts else nothing

    def _forward(self, pixels: Tensor) -> Tensor:
        return projected(self.model.get_image_features(pixel_values=pixels))

    def _encode(self, texts: list[str]) -> np.ndarray:
        # The tokenizer cuts long texts, since it keeps the end token, which CLIP reads.
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_tokens).input_ids
        of_width: dict[int, list[int]] = {}
        for place, row in enumerate(tokens):
            width = min(math.ceil(len(row) / _WIDTH) * _WIDTH, self.max_tokens)
            of_width.setdefault(width, []).append(place)
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        size = self._batch(_CPU_TEXTS)
        for width, places in of_width.items():
            for part in _parts(places, size):
                rows = [tokens[place] for place in _filled_up(part, size)]
                vectors[part] = self._encode_tokens(rows, width)[: len(part)]
        return vectors

    def _encode_tokens(self, tokens: list[list[int]], width: int) -> np.ndarray:
        """Of rows of token ids, which are filled up to `width`."""
        import torch

        filled = self.tokenizer.pad(
            {"input_ids": tokens}, padding="max_length", max_length=width, return_tensors="pt"
        )
        with (
            self._noticing_a_gone_device(),
            torch.inference_mode(),
            computing_in(self.precision, self.device),
        ):
            filled = filled.to(self.device)
            return unit(
                projected(
                    self.model.get_text_features(
                        input_ids=filled.input_ids, attention_mask=filled.attention_mask
                    )
                )
            )


class DinoEncoder(_Encoder):
    """The class token of a DINO (Caron et al. 2021) or DINOv2 (Oquab et al. 2023).

    Self-supervised features tell one object from another where CLIP's see only "a rocket", which
    is why Ruiz et al. (2023) measure DreamBooth's subject fidelity with them. `crop` is the model's
    own preprocessing, `pad` as for CLIP. Raises ModelMissing.
    """

    def __init__(self, settings: ScorerSettings, root: Path) -> None:
        import transformers

        super().__init__(settings, root)
        self.image_processor = self._load(transformers.AutoImageProcessor, backend="pil")
        # DINO's files have no pooler, of which nothing is read.
        self.model = self._load_weights(transformers.AutoModel, dispensable=("pooler.",))
        self.dimension = int(self.model.config.hidden_size)

    def _forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


def _parts(some: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (some[start : start + size] for start in range(0, len(some), size))


def _filled_up(some: Sequence[T], size: int) -> list[T]:
    """As many as `size`, the last one again and again. The last bits of a product of matrices
    depend on their shape, and those of an embedding must not depend on how many others were
    missing beside it: the same inputs give the same tables, whatever was there before."""
    return [*some, *repeat(some[-1], size - len(some))]


def projected(features: Any) -> Tensor:
    """The projected features; transformers 5 wraps them in an output."""
    return getattr(features, "pooler_output", features)


def unit(features: Tensor) -> np.ndarray:
    """Features of length 1, float32 (batch, dimension): cast first, so that nothing is lost."""
    vectors = features.float()
    return (vectors / vectors.norm(dim=-1, keepdim=True)).cpu().numpy()


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of images by their keys."""

    vectors: dict[str, np.ndarray]
    """float32 (dimension,), of length 1."""
    unreadable: dict[str, str]
    """Why an image has none."""

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """float32 (len(keys), dimension). Raises KeyError for a key without an embedding."""
        return np.stack([self.vectors[key] for key in keys]) if keys else np.zeros((0, 0), "f4")


@dataclass(frozen=True)
class Alteration:
    """What is done to images before an encoder sees them."""

    name: str
    """Names what it does: embeddings of what it made are kept under it."""
    alter: Callable[[Image.Image], Image.Image]


def kept_embeddings(
    store: Store,
    settings: ScorerSettings,
    root: Path,
    images: Mapping[str, Path],
    progress: Progress,
    *,
    encoder: ImageEncoder | None = None,
    alteration: Alteration | None = None,
) -> Embeddings:
    """Embeddings of `images` (content hash to file), or of what `alteration` makes of them: those
    the store has, the others made now.

    The model is loaded only if something is missing; give `encoder` where one is loaded already.
    Embeddings are kept as they come, so that a kill loses little. An image that cannot be read, or
    that gives no finite number, is named with the reason. Raises ModelMissing.
    """
    encoded_by = encoder.encoder_id if encoder else encoder_id(settings, root)
    kind = f"embedding.{encoded_by}.v{ENCODER_VERSION}"
    if alteration is not None:
        kind = f"{kind}.{alteration.name}"
    unreadable: dict[str, str] = {}

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        worker = encoder or image_encoder(settings, root)
        with progress.task(f"Encoding {len(missing)} images", len(missing), "images") as tick:
            for batch in _encoded(worker, images, missing, settings.batch_size, alteration):
                for key, found in batch:
                    if isinstance(found, str):
                        unreadable[key] = found
                    else:
                        yield key, {"vector": _packed(found)}
                tick(len(batch))

    save_every = max(settings.batch_size, _SAVE_EVERY)
    rows = compute_missing(store, kind, list(images), compute, save_every=save_every)
    return Embeddings(
        vectors={key: _unpacked(row["vector"]) for key, row in rows.items()},
        unreadable={key: reason for key, reason in unreadable.items() if key not in rows},
    )


def kept_text_embeddings(
    store: Store, settings: ScorerSettings, root: Path, texts: Sequence[str]
) -> np.ndarray:
    """Embeddings of texts by a CLIP, of length 1, float32 (len(texts), dimension).

    The model is loaded only for texts that the store does not have. Raises ModelMissing.
    """
    # A text does not know how images are prepared.
    kind = f"text_embedding.{encoder_id(settings, root).partition('.')[2]}.v{ENCODER_VERSION}"
    text_of = {content_key(text): text for text in texts}

    def compute(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        vectors = ClipEncoder(settings, root).text_features([text_of[key] for key in missing])
        for key, vector in zip(missing, vectors, strict=True):
            yield key, {"vector": _packed(vector)}

    rows = compute_missing(store, kind, list(text_of), compute, save_every=_SAVE_EVERY)
    return np.stack([_unpacked(rows[content_key(text)]["vector"]) for text in texts])


Found = tuple[str, np.ndarray | str]
"""The key of an image, with its embedding (or pixels), or why it has none."""


def _encoded(
    encoder: ImageEncoder,
    images: Mapping[str, Path],
    keys: Sequence[str],
    size: int,
    alteration: Alteration | None,
) -> Iterator[list[Found]]:
    """Embeddings, float32 (dimension,), batch by batch in the order of `keys`.

    A GPU finds the next batch opened when it has encoded one. On a CPU every core takes small
    batches of its own from file to embedding, which is a quarter faster than all of them working on
    each matrix together: none waits for another.
    """
    opened = partial(_opened, encoder, images, alteration)
    if best_device().type == "cpu":
        size = min(size, _CPU_BATCH)
        yield from parallel_map(
            lambda part: _features(encoder, [opened(key) for key in part]),
            _parts(keys, size),
            prepare_thread=_one_core,
        )
        return
    waiting = parallel_map(opened, keys, ahead=size)
    while batch := list(islice(waiting, size)):
        yield _features(encoder, batch)


def _one_core() -> None:
    import torch

    torch.set_num_threads(1)  # of this thread


def _features(encoder: ImageEncoder, batch: Sequence[Found]) -> list[Found]:
    """Embeddings of opened images; those that could not be opened keep their reason."""
    ready = [found for _, found in batch if not isinstance(found, str)]
    vectors = map(_if_finite, encoder.prepared_features(ready))
    return [(key, found if isinstance(found, str) else next(vectors)) for key, found in batch]


def _if_finite(vector: np.ndarray) -> np.ndarray | str:
    return vector if np.isfinite(vector).all() else "the encoder gave no finite number"


def _opened(
    encoder: ImageEncoder, images: Mapping[str, Path], alteration: Alteration | None, key: str
) -> Found:
    """An image as the encoder sees it, or why it cannot be read."""
    try:
        with Image.open(images[key]) as image:
            return key, encoder.prepare(alteration.alter(image) if alteration else image)
    except (OSError, SyntaxError) as error:  # Pillow's word for a broken PNG
        return key, (
            f"{images[key]}: {UNREADABLE} ({error}); materialize the assets that make it again"
        )


def _packed(vector: np.ndarray) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
