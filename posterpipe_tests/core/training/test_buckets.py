"""Aspect-ratio buckets: equal area, whole steps, the nearest shape."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from posterpipe.core.images import resize, resize_key
from posterpipe.core.training.buckets import MAX_RATIO, bucket_of, bucket_sizes
from posterpipe.settings import ImageSettings

SIDES = st.sampled_from([64, 96, 256, 512, 768])
STEPS = st.sampled_from([8, 32, 64])


@given(SIDES, SIDES, STEPS)
def test_buckets_are_whole_steps_of_about_the_area(width: int, height: int, step: int) -> None:
    sizes = bucket_sizes(width, height, step)
    own = (width // step * step, height // step * step)
    assert own in sizes
    for size in sizes:
        assert size[0] % step == size[1] % step == 0
        assert size[0] * size[1] <= width * height
        assert size == own or max(size) <= MAX_RATIO * min(size)
        # One more step at either side would be too much.
        assert size == own or (min(size) + step) * (max(size) + step) > width * height


def test_the_buckets_of_512_pixels() -> None:
    sizes = bucket_sizes(512, 512, 64)
    assert {(512, 512), (384, 640), (640, 384), (448, 576), (576, 448)} <= set(sizes)


@pytest.mark.parametrize(
    ("image", "bucket"),
    [((1400, 2100), (384, 640)), ((1000, 1000), (512, 512)), ((1900, 1000), (640, 384))],
)
def test_an_image_goes_where_it_loses_least(
    image: tuple[int, int], bucket: tuple[int, int]
) -> None:
    found = bucket_of(*image, 512, 512, 64)
    wanted = math.log(image[0] / image[1])
    misfits = {
        size: abs(math.log(size[0] / size[1]) - wanted) for size in bucket_sizes(512, 512, 64)
    }
    assert misfits[found] == min(misfits.values())
    assert found == bucket


def test_a_poster_is_cropped_to_its_bucket_and_no_further() -> None:
    settings = ImageSettings(width=512, height=512, fit="bucket")
    image = Image.new("RGB", (1400, 2100), "white")
    ImageDraw.Draw(image).rectangle((0, 100, 1399, 1999), fill="black")
    resized = resize(image, settings)
    assert resized.size == (384, 640)
    # 2:3 into 3:5: a little at the sides, nothing above and below.
    assert resized.getpixel((192, 5)) == (255, 255, 255)
    assert resized.getpixel((5, 320)) == (0, 0, 0)
    other = settings.model_copy(update={"bucket_step": 32})
    assert resize_key("poster", other) != resize_key("poster", settings)


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_every_image_has_a_bucket(width: int, height: int) -> None:
    assert bucket_of(width, height, 512, 512, 64) in bucket_sizes(512, 512, 64)
