"""From an order to a poster: draw, score, letter, pack.

What belongs here: the models in memory, one poster from its order, and the PNG that is saved. What
does not: whose turn it is (`engine`), how images are drawn (`core.sampler`), titles are set
(`core.typography`) and fit is measured (`core.metrics.clip`).

A poster has the pixels that the pipeline draws for the same prompt, seed, model and settings. It is
scored before its title is set, since CLIP reads words in an image.
"""

from __future__ import annotations

import io
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from posterpipe.core.generations import blocked_reason, parameters_text, png_with_parameters
from posterpipe.core.memory import is_out_of_memory
from posterpipe.core.metrics.clip import ClipTextSimilarity
from posterpipe.core.models import ModelMissing, fingerprint
from posterpipe.core.provenance.checkpoints import require_checkpoint
from posterpipe.core.sampler import ImageRequest, Sampler, text_limit
from posterpipe.core.store import Store
from posterpipe.core.typography import TitleImpossible, enlarged, set_title
from posterpipe.settings import Settings
from posterpipe.studio.served import Choice, model_folder

if TYPE_CHECKING:
    from posterpipe.studio.engine import Order

PREVIEW = 320
"""Width of the small picture of a poster, pixels."""

KEPT_MODELS = 2
"""Models in memory at once: enough to compare two."""


@dataclass(frozen=True)
class Poster:
    """A finished poster."""

    image: Image.Image
    """As the model drew it, RGB."""
    png: bytes
    """Large, with its title, and how it was made as a text chunk."""
    preview: bytes
    """The same small, as WebP."""
    order: Order
    """What was asked for; it may have asked for other seeds and models as well."""
    title: str
    """As it was set, "" where there is none or it could not be set."""
    seed: int
    choice: Choice
    score: float | None
    """Cosine of image and description by the scorer, -1 to 1; None where it could not be had."""
    notes: tuple[str, ...]
    """Sentences about what is not as it was asked for."""


class Painter:
    """Draws with the models of a deployment. Called by one thread at a time.

    The two models used last stay in memory.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # One by one, so that each poster is seen when it is done; compiling takes minutes.
        how = {"batch_size": 1, "compile": False}
        self.sampling = settings.sampler.model_copy(update=how)
        self._samplers: OrderedDict[str, Sampler] = OrderedDict()
        self._limits: dict[str, tuple[Callable[[str], int], int]] = {}
        self._scorer: ClipTextSimilarity | None = None
        self._no_scorer = ""

    @property
    def loaded(self) -> set[str]:
        """Names of the models in memory."""
        return set(self._samplers)

    def ready(self, choice: Choice) -> bool:
        """Whether the model is loaded."""
        return choice.name in self._samplers

    def prepare(self, choice: Choice) -> None:
        """Load a model, in the place of the one that was used longest ago, and the scorer. Raises
        ModelMissing, CheckpointMismatch and StoreError."""
        if choice.name not in self._samplers:
            settings = self.settings
            folder = model_folder(choice, settings)
            model_id = choice.name
            if choice.kind == "base":
                model_id = fingerprint(settings.base_model, settings.root)
            else:
                store = Store(settings.path(settings.store))
                require_checkpoint(store, folder, checkpoint_id=choice.name)
            while len(self._samplers) >= KEPT_MODELS:
                # Before the new one is loaded, so that there is room for it.
                name, _ = self._samplers.popitem(last=False)
                self._limits.pop(name, None)
            self._limits[choice.name] = text_limit(folder)
            self._samplers[choice.name] = Sampler(folder, self.sampling, model_id=model_id)
        self._samplers.move_to_end(choice.name)
        if self._scorer is None and not self._no_scorer:
            try:
                self._scorer = ClipTextSimilarity(self.settings.scorer, self.settings.root)
            except ModelMissing as error:
                # A poster without its score is still a poster.
                self._no_scorer = f"No scores: {error}."

    def paint(
        self, order: Order, choice: Choice, seed: int, on_step: Callable[[int, int], None]
    ) -> Poster:
        """One poster. `on_step(done, total)` is called after each step; what it raises stops the
        drawing."""
        self.prepare(choice)
        start = self.sampling.negative_from if order.negative else 0.0
        request = ImageRequest(order.description, order.negative, seed, start)
        sampler = self._samplers[choice.name]
        try:
            image = sampler([request], on_step)[0]
        except RuntimeError as error:
            # The sampler's own error names settings, for who runs the studio: they go to the log.
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise MemoryError(str(error)) from error
            raise
        notes = self._unread(choice, order)
        blocked = blocked_reason(image)
        score: float | None = None
        if blocked:
            notes.append(f"The model drew nothing: {blocked}.")
        elif self._scorer is None:
            notes.append(self._no_scorer)
        else:
            score = float(self._scorer([image], [order.description])[0])
        about = parameters_text(request, self.sampling, sampler.model_id)
        shown, lettered = self._lettered(image, order, notes)
        return Poster(
            image=image,
            png=png_with_parameters(shown, f"{about}, {lettered}" if lettered else about),
            preview=_preview(shown),
            order=order,
            title=order.title if lettered else "",
            seed=seed,
            choice=choice,
            score=score if score is None or math.isfinite(score) else None,
            notes=tuple(notes),
        )

    def close(self) -> None:
        """Forgets the models."""
        self._samplers.clear()
        self._scorer = None

    def _lettered(
        self, image: Image.Image, order: Order, notes: list[str]
    ) -> tuple[Image.Image, str]:
        """The poster at its full size, with its title where there is one, and what to write about
        the lettering."""
        lettering = self.settings.lettering.model_copy(update={"style": order.style})
        if order.title:
            try:
                titled, layout = set_title(image, order.title, lettering)
            except TitleImpossible as error:
                notes.append(f"The title was left out: {error}.")
            else:
                if layout.left_out:
                    notes.append(f"No font has {layout.left_out}: the title is set without.")
                title = json.dumps(order.title, ensure_ascii=False)
                return titled, f"Title: {title}, Lettering: {layout.style}"
        return enlarged(image, lettering.min_width), ""

    def _unread(self, choice: Choice, order: Order) -> list[str]:
        """What the model could not read of the order, in words."""
        count, most = self._limits[choice.name]
        notes = []
        for what, text in (("description", order.description), ("negative prompt", order.negative)):
            if count(text) > most:
                read = last_read(text, count, most)
                notes.append(f"The model reads the {what} as far as {read!r}, not what follows.")
        return notes


def _preview(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((PREVIEW, 2 * PREVIEW), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def last_read(text: str, count: Callable[[str], int], most: int) -> str:
    """The last word of a text that fits into `most` tokens whole."""
    words = text.split()
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if count(" ".join(words[:middle])) <= most:
            low = middle
        else:
            high = middle - 1
    return words[low - 1] if low else words[0][:20]
