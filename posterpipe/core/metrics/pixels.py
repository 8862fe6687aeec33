"""Images into what an encoder sees.

What belongs here: what an image processor of transformers does, split into the part for one image,
which any thread can do, and the part for a batch, which is done at once. What does not: the
encoders (`encoders`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Preparation:
    """An image processor of transformers in its PIL form, with the same pixels to the last bit and
    a float's rounding, several times as fast on small images.

    `pad` puts the whole image on a square of the processor's mean colour first, and makes that
    square as large as what the processor would cut out, so that nothing is cut. A processor that
    does anything but resize, cut the middle out, rescale and normalise is called as it is.
    """

    def __init__(self, processor: Any, *, pad: bool) -> None:
        self._processor = processor
        self._pad_colour: tuple[int, int, int] | None = None
        if pad:
            mean = np.round(np.asarray(processor.image_mean) * 255).astype(int)
            self._pad_colour = (int(mean[0]), int(mean[1]), int(mean[2]))
        self._known = _is_known(processor)

    def image(self, image: Image.Image) -> np.ndarray:
        """What is left of one image, (3, height, width): uint8, or float32 where the processor did
        it all. From any thread."""
        rgb = image.convert("RGB")
        if self._pad_colour is not None:
            rgb = letterbox(rgb, self._pad_colour)
        done: dict[str, bool] = {}
        if self._pad_colour is not None and getattr(self._processor, "do_center_crop", False):
            size = (self._processor.crop_size.width, self._processor.crop_size.height)
            rgb = rgb.resize(size, resample=self._processor.resample)
            done = {"do_resize": False, "do_center_crop": False}
        shown = (rgb if done else self._middle(rgb)) if self._known else None
        if shown is not None:
            # Here, on small pieces, rather than on a batch.
            return np.ascontiguousarray(np.asarray(shown).transpose(2, 0, 1))
        return self._processor(rgb, return_tensors="np", **done).pixel_values[0]

    def batch(self, prepared: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """Normalised pixels, float32 (batch, 3, height, width), of what `image` gave."""
        import torch

        if any(pixels.dtype != np.uint8 for pixels in prepared):
            done = [self._normalised(pixels) for pixels in prepared]
            return torch.from_numpy(np.stack(done)).to(device)
        pixels = torch.from_numpy(np.stack(prepared)).to(device).float()
        processor = self._processor
        scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        if not processor.do_normalize:
            return pixels.mul_(scale)
        # (pixels * scale - mean) / std, in two passes over the memory.
        mean, std = (
            torch.tensor(values, device=device).view(-1, 1, 1)
            for values in (processor.image_mean, processor.image_std)
        )
        return pixels.mul_(scale / std).sub_(mean / std)

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        """One of a batch in which the processor had to do others."""
        if pixels.dtype != np.uint8:
            return pixels
        return self._processor(
            Image.fromarray(pixels.transpose(1, 2, 0)),
            return_tensors="np",
            do_resize=False,
            do_center_crop=False,
        ).pixel_values[0]

    def _middle(self, image: Image.Image) -> Image.Image | None:
        """Resized and cut; None where there is less than is to be cut out."""
        processor = self._processor
        if processor.do_resize:
            image = image.resize(_target(image, processor.size), resample=processor.resample)
        if processor.do_center_crop:
            width, height = processor.crop_size.width, processor.crop_size.height
            if image.width < width or image.height < height:
                return None
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return image


def _is_known(processor: Any) -> bool:
    from transformers.image_processing_backends import PilBackend

    kind = type(processor)
    same = all(
        getattr(kind, name, None) is getattr(PilBackend, name)
        for name in ("_preprocess", "resize", "center_crop", "rescale", "normalize")
    )
    size = processor.size if same and processor.do_resize else None
    return (
        same
        and not getattr(processor, "do_pad", False)
        and (
            size is None
            or bool(size.shortest_edge and not size.longest_edge)
            or bool(size.height and size.width and not size.shortest_edge)
        )
    )


def _target(image: Image.Image, size: Any) -> tuple[int, int]:
    """Width and height after the resize, rounded as transformers does."""
    if not size.shortest_edge:
        return size.width, size.height
    longer = int(size.shortest_edge * max(image.size) / min(image.size))
    short = int(size.shortest_edge)
    return (short, longer) if image.width <= image.height else (longer, short)


def letterbox(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The whole image in the middle of a square of its longer side, RGB."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
