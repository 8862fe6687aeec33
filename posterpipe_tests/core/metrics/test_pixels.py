"""Pixels against the image processors of transformers, for sizes and modes that nobody expects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, ViTImageProcessorPil

from posterpipe.core.metrics import pixels
from posterpipe.core.metrics.pixels import Preparation, letterbox

CPU = torch.device("cpu")
SQUARE = {"height": 24, "width": 24}
PROCESSORS: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SQUARE),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
    "dino": ViTImageProcessorPil(size=SQUARE),
    "odd crop": CLIPImageProcessorPil(
        size={"shortest_edge": 25}, crop_size={"height": 21, "width": 24}
    ),
    "crop larger than the image": CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size=SQUARE
    ),
    "no resize": CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE),
    "no normalisation": CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size=SQUARE, do_normalize=False
    ),
}


@pytest.mark.parametrize("name", list(PROCESSORS))
@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK"]),
    seed=st.integers(0, 5),
)
def test_pixels_are_those_of_the_processor(
    name: str, width: int, height: int, mode: str, seed: int
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    processor = PROCESSORS[name]
    ours = Preparation(processor, pad=False)
    found = ours.batch([ours.image(image)], CPU)
    expected = processor(image.convert("RGB"), return_tensors="pt").pixel_values
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("pad", [False, True])
def test_a_batch_is_its_images_beside_each_other(pad: bool) -> None:
    processor = PROCESSORS["crop larger than the image"]
    sizes = [(40, 24), (24, 40), (9, 9), (24, 24)]
    images = [Image.new("RGB", size, (40 * n, 90, 200)) for n, size in enumerate(sizes)]
    ours = Preparation(processor, pad=pad)
    whole = ours.batch([ours.image(image) for image in images], CPU)
    for image, found in zip(images, whole, strict=True):
        kept: dict[str, Any] = {}
        shown = image
        if pad:  # nothing is cut, and nothing added, of the square with the whole image
            shown = letterbox(image, (123, 117, 104)).resize((24, 24), Image.Resampling.BICUBIC)
            kept = {"do_resize": False, "do_center_crop": False}
        expected = processor(shown, return_tensors="pt", **kept).pixel_values[0]
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_a_processor_of_another_kind_does_it_all_itself() -> None:
    class Inverted(CLIPImageProcessorPil):
        def normalize(self, image: np.ndarray, mean: Any, std: Any, **_: Any) -> np.ndarray:
            return 1 - image

    processor = Inverted(size={"shortest_edge": 24}, crop_size=SQUARE)
    assert not pixels._is_known(processor)
    ours = Preparation(processor, pad=False)
    image = Image.new("RGB", (30, 40), (10, 20, 30))
    found = ours.batch([ours.image(image)], CPU)
    torch.testing.assert_close(found, processor(image, return_tensors="pt").pixel_values)


@pytest.mark.parametrize("name", ["dinov2", "dino", "clip", "odd crop", "no resize"])
@pytest.mark.parametrize("known", [True, False])
def test_padded_images_are_seen_to_their_edges(
    name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(pixels, "_is_known", lambda processor: False)
    image = Image.new("RGB", (60, 90), (0, 0, 255))
    image.paste((255, 255, 255), (0, 0, 60, 8))
    ours = Preparation(PROCESSORS[name], pad=True)
    found = ours.batch([ours.image(image)], CPU)[0]
    middle = found[:, :, found.shape[2] // 2]
    assert middle[0, 0] > middle[0, -1] + 0.9, "red: the white edge above, none below"
