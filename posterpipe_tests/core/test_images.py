"""Every kind of image becomes the training image that a person would expect."""

from __future__ import annotations

import functools
import hashlib
import io
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageFont

from posterpipe.core.images import (
    ImageRejected,
    TooManyPixels,
    decode,
    hash_distance,
    open_image,
    perceptual_hash,
    png_bytes,
    prepare,
    resize_key,
    resize_posters,
    retriable_count,
)
from posterpipe.core.memory import TOO_LITTLE_MEMORY
from posterpipe.core.parallel import cores
from posterpipe.core.store import Store
from posterpipe.settings import ImageSettings

SETTINGS = ImageSettings(width=64, height=96, min_side=8)
RAW_POSTERS = Path(__file__).parents[2] / "data" / "raw_posters"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB", size: tuple[int, int] = (64, 96)) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def near(image: Image.Image, place: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    found = np.array(image.getpixel(place), dtype=int)
    return bool(np.abs(found - colour).max() <= 12)


@functools.cache
def png_bomb(width: int, height: int) -> bytes:
    """A small PNG whose header promises width x height pixels of one bit."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    packer = zlib.compressobj(1)
    line = bytes(1 + (width + 7) // 8)
    body = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def psnr(ours: Image.Image, theirs: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB; 99 for equal images."""
    error = np.mean((np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def resized_by_the_thesis(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Every pixel decoded, then LANCZOS."""
    return Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.LANCZOS)


def test_stretch_is_what_the_thesis_does() -> None:
    settings = SETTINGS.model_copy(update={"width": 304, "height": 456})
    for name in ("star_sailor.png", "barley_roadster.jpg"):
        data = (RAW_POSTERS / name).read_bytes()
        result = prepare(data, settings)
        assert result.mode == "RGB"
        # Less than twice the training size: nothing is skipped.
        assert result.tobytes() == resized_by_the_thesis(data, (304, 456)).tobytes()


@pytest.mark.parametrize("width", [257, 350, 513, 777, 1025])
@pytest.mark.parametrize(("content", "least"), [("poster", 45.0), ("grain", 40.0), ("print", 32.0)])
def test_shrinking_in_two_steps_is_as_good_as_in_one(
    content: str, least: float, width: int
) -> None:
    size = (width, width * 3 // 2)
    poster = Image.open(RAW_POSTERS / "star_sailor.png").convert("RGB")
    poster = poster.resize(size, Image.Resampling.LANCZOS)
    if content == "grain":
        grain = np.random.default_rng(0).normal(0, 20, (size[1], size[0], 1))
        poster = Image.fromarray(np.clip(np.asarray(poster) + grain, 0, 255).astype(np.uint8))
    elif content == "print":
        poster = Image.new("RGB", size, "white")
        pen, font = ImageDraw.Draw(poster), ImageFont.load_default(14)
        for line in range(0, size[1], 18):
            pen.text((5, line), "The quick brown fox 0123456789 " * 4, fill="black", font=font)
    settings = SETTINGS.model_copy(update={"width": 128, "height": 192})
    for data in (encoded(poster, "JPEG", quality=90), encoded(poster)):
        expected = resized_by_the_thesis(data, (128, 192))
        assert psnr(prepare(data, settings), expected) >= least


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop", "bucket"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_in_part_has_its_whole_picture(fit: str, orientation: int) -> None:
    # 1037 and 771 are no multiples of 2, 4 or 8: the last decoded pixels are only partly picture.
    image = Image.open(RAW_POSTERS / "star_sailor.png").convert("RGB").resize((1037, 771))
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = SETTINGS.model_copy(update={"fit": fit, "bucket_step": 8})
    result = prepare(encoded(image, "JPEG", quality=95, exif=exif), settings)
    # A PNG is never decoded in part.
    expected = prepare(encoded(image, "PNG", exif=exif), settings)
    assert result.size == expected.size
    assert psnr(result, expected) >= 35


def test_a_jpeg_far_above_the_training_size_is_decoded_in_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[tuple[int, int]] = []

    def noting(image: Image.Image) -> None:
        decode(image)
        decoded.append(image.size)

    monkeypatch.setattr("posterpipe.core.images.decode", noting)
    for width in (127, 128, 255, 256, 600, 2000):
        prepare(encoded(halves(size=(width, 2000)), "JPEG"), SETTINGS)
    assert decoded == [
        *((127, 2000), (128, 2000), (255, 2000)),
        *((128, 1000), (150, 500), (250, 250)),
    ]


def test_pad_keeps_the_whole_poster_and_its_proportions() -> None:
    settings = SETTINGS.model_copy(update={"width": 96, "fit": "pad"})
    result = prepare(encoded(halves(size=(200, 400))), settings)
    assert result.size == (96, 96)
    assert near(result, (4, 48), (255, 255, 255))
    assert near(result, (30, 48), RED)
    assert near(result, (66, 48), BLUE)


def test_crop_cuts_the_longer_side_around_the_centre() -> None:
    settings = SETTINGS.model_copy(update={"width": 96, "fit": "crop"})
    wide = Image.new("RGB", (300, 100), GREEN)
    wide.paste(halves(size=(100, 100)), (100, 0))
    result = prepare(encoded(wide), settings)
    assert result.size == (96, 96)
    assert near(result, (5, 48), RED)
    assert near(result, (90, 48), BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation: int) -> None:
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    upright = halves()
    upright.paste(GREEN, (0, 0, 32, 48))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upright.transpose(stored) if stored is not None else upright
    result = prepare(encoded(image, "PNG", exif=exif), SETTINGS)
    assert result.tobytes() == upright.tobytes()


MODES = {
    "PNG": ("RGB", "RGBA", "P"),
    "TIFF": ("RGB", "RGBA", "P", "CMYK"),
    "JPEG": ("RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "P"),
    "GIF": ("RGB", "P"),
    "AVIF": ("RGB", "RGBA"),
}


@pytest.mark.parametrize(
    ("image_format", "mode"), [(name, mode) for name, modes in MODES.items() for mode in modes]
)
def test_colours_survive_every_format_and_mode(image_format: str, mode: str) -> None:
    options = {} if image_format in ("PNG", "TIFF", "BMP", "GIF") else {"quality": 95}
    result = prepare(encoded(halves(mode), image_format, **options), SETTINGS)
    assert result.mode == "RGB"
    assert near(result, (10, 48), RED)
    assert near(result, (54, 48), BLUE)


def test_transparency_lies_over_white() -> None:
    image = halves("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 64, 48))
    assert near(prepare(encoded(image), SETTINGS), (10, 20), (255, 255, 255))
    assert near(prepare(encoded(image), SETTINGS), (10, 80), RED)
    image.paste((255, 0, 0, 128), (0, 48, 64, 96))
    assert near(prepare(encoded(image), SETTINGS), (10, 80), (255, 127, 127))


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_colour_named_transparent_is_white(mode: str) -> None:
    image = Image.new("RGB", (64, 96), (40, 40, 40))
    image.paste((200, 200, 200), (0, 48, 64, 96))
    image = image.convert(mode)
    transparent = image.getpixel((0, 0))
    result = prepare(encoded(image, transparency=transparent), SETTINGS)
    assert near(result, (10, 20), (255, 255, 255))
    assert near(result, (10, 80), (200, 200, 200))


@pytest.mark.parametrize(
    ("values", "image_format"),
    [
        (np.full((96, 64), 32896, dtype=np.uint16), "PNG"),
        (np.full((96, 64), 32896, dtype=np.uint16), "TIFF"),
        (np.full((96, 64), 32896, dtype=np.int32), "TIFF"),
        (np.full((96, 64), 128, dtype=np.int32), "TIFF"),
        (np.full((96, 64), 0.502, dtype=np.float32), "TIFF"),
        (np.full((96, 64), 128.0, dtype=np.float32), "TIFF"),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "32-bit", "32-bit small", "float 0..1", "float 0..255"],
)
def test_deep_greys_keep_their_brightness(values: np.ndarray, image_format: str) -> None:
    if values.dtype != np.uint16:
        values[0, 0] = {"i": 255 if values[1, 1] < 256 else 65535, "f": values[1, 1]}[
            values.dtype.kind
        ]
    result = prepare(encoded(Image.fromarray(values), image_format), SETTINGS)
    assert near(result, (32, 48), (128, 128, 128))


def test_one_bit_and_grey_alpha() -> None:
    bits = Image.new("1", (64, 96), 1)
    assert near(prepare(encoded(bits), SETTINGS), (32, 48), (255, 255, 255))
    grey = Image.new("LA", (64, 96), (90, 255))
    assert near(prepare(encoded(grey), SETTINGS), (32, 48), (90, 90, 90))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_a_lab_profile_are_brought_to_srgb(mode: str) -> None:
    # Lab TIFFs and images with a damaged profile are read as well as they can be.
    lab = ImageCms.profileToProfile(
        halves(),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    assert near(prepare(encoded(lab, "TIFF"), SETTINGS), (10, 48), RED)
    damaged = encoded(halves(mode), icc_profile=b"no profile")
    assert near(prepare(damaged, SETTINGS), (10, 48), RED)


def test_a_profile_keeps_the_alpha() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = halves("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 64, 48))
    result = prepare(encoded(image, icc_profile=srgb), SETTINGS)
    assert near(result, (10, 20), (255, 255, 255))
    assert near(result, (10, 80), RED)


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (64, 96), colour) for colour in (RED, GREEN, BLUE)]
    for image_format in ("GIF", "WEBP"):
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
        assert near(prepare(data, SETTINGS), (32, 48), RED)


def test_a_bomb_is_refused_by_its_header() -> None:
    data = png_bomb(30_000, 30_000)
    with pytest.raises(TooManyPixels, match=r"30000x30000 pixels .* images\.max_pixels"):
        prepare(data, SETTINGS)


def test_the_limit_on_pixels_can_be_raised_above_that_of_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert prepare(encoded(halves()), SETTINGS).size == (64, 96)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"This is a text file.", "no image in it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 96\n", "no image in it"),
        (encoded(halves(size=(300, 300)), "JPEG")[:-200], "cannot be decoded"),
        (encoded(halves(size=(300, 300)), "PNG")[:-60], "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 50, "."),
    ],
    ids=["empty", "text", "postscript", "truncated JPEG", "truncated PNG", "broken header"],
)
def test_what_is_no_image_is_rejected_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageRejected, match=reason):
        prepare(data, SETTINGS)


def test_phones_multi_picture_files_are_jpegs() -> None:
    data = encoded(halves(), "MPO", save_all=True, append_images=[halves()])
    assert open_image(data, 10**6).format == "MPO"
    assert near(prepare(data, SETTINGS), (10, 48), RED)


# -- the table -----------------------------------------------------------------------------------


def posters(*poster_ids: str, status: str = "ok") -> pd.DataFrame:
    return pd.DataFrame({"poster_id": poster_ids, "status": status})


def test_each_usable_poster_gets_one_image(store: Store) -> None:
    first, second = store.put(encoded(halves())), store.put(encoded(halves(size=(200, 100))))
    table = pd.concat([posters(first, second, first), posters("f" * 64, status="rejected")])
    result = resize_posters(store, table, SETTINGS)
    assert list(result.columns) == [
        *("poster_id", "image", "fit", "width", "height", "status", "reason"),
    ]
    assert list(result["poster_id"]) == sorted([first, second])
    assert set(result["status"]) == {"ok"}
    for row in result.itertuples():
        data = store.path(str(row.image), ".png").read_bytes()
        assert hashlib.sha256(data).hexdigest() == row.image
        assert Image.open(io.BytesIO(data)).size == (64, 96)


def test_only_new_posters_are_resized(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = store.put(encoded(halves())), store.put(encoded(halves(size=(200, 100))))
    resize_posters(store, posters(first), SETTINGS)
    prepared: list[int] = []

    def counting(data: bytes, settings: ImageSettings) -> Image.Image:
        prepared.append(len(data))
        return prepare(data, settings)

    monkeypatch.setattr("posterpipe.core.images.prepare", counting)
    assert len(resize_posters(store, posters(first, second), SETTINGS)) == 2
    assert len(prepared) == 1
    resize_posters(store, posters(first, second), SETTINGS)
    assert len(prepared) == 1


def test_a_lost_image_is_made_again_and_a_lost_poster_is_a_row(store: Store) -> None:
    poster_id = store.put(encoded(halves()))
    image = resize_posters(store, posters(poster_id), SETTINGS)["image"][0]
    store.path(image, ".png").unlink()
    assert resize_posters(store, posters(poster_id), SETTINGS)["image"][0] == image
    assert store.has(image, ".png")
    lost = resize_posters(store, posters(poster_id, "f" * 64), SETTINGS).iloc[1]
    assert lost["status"] == "failed"
    assert "materialize raw_posters again" in lost["reason"]


def test_only_what_may_succeed_counts_as_worth_another_try(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, broken = store.put(encoded(halves())), store.put(b"no image")
    assert retriable_count(resize_posters(store, posters(good, broken), SETTINGS)) == 0
    assert retriable_count(resize_posters(store, posters(broken, "f" * 64), SETTINGS)) == 1

    def full(image: Image.Image) -> Image.Image:
        raise MemoryError(f"{image.width} bytes")

    monkeypatch.setattr("posterpipe.core.images.to_rgb", full)
    wide = resize_posters(store, posters(good), SETTINGS.model_copy(update={"width": 8}))
    assert (wide["reason"][0], retriable_count(wide)) == (TOO_LITTLE_MEMORY, 1)


def test_no_posters_give_an_empty_table_with_columns(store: Store) -> None:
    assert "image" in resize_posters(store, posters(), SETTINGS).columns


def test_the_key_holds_what_decides_the_pixels() -> None:
    key = resize_key("a", SETTINGS)
    for change in ({"width": 128}, {"height": 128}, {"fit": "pad"}):
        assert resize_key("a", SETTINGS.model_copy(update=change)) != key
    assert resize_key("a", SETTINGS.model_copy(update={"min_side": 1})) == key


def test_png_bytes_depend_on_pixels_alone() -> None:
    image = halves()
    image.info["icc_profile"] = b"something"
    image.info["dpi"] = (72, 72)
    assert png_bytes(image) == png_bytes(halves())


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (64, 96)])
def test_png_bytes_hold_the_pixels_and_stay_small(size: tuple[int, int]) -> None:
    poster = Image.open(RAW_POSTERS / "star_sailor.png").convert("RGB").resize(size)
    data = png_bytes(poster)
    image = Image.open(io.BytesIO(data))
    image.verify()  # checksums included
    assert Image.open(io.BytesIO(data)).tobytes() == poster.tobytes()
    assert len(data) < 1.25 * len(encoded(poster))


def test_of_many_posters_one_a_core_is_decoded_at_a_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def slow(data: bytes, settings: ImageSettings) -> Image.Image:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        image = prepare(data, settings)
        with lock:
            now -= 1
        return image

    monkeypatch.setattr("posterpipe.core.images.prepare", slow)
    ids = [store.put(encoded(halves(size=(70 + number, 96)))) for number in range(24)]
    assert set(resize_posters(store, posters(*ids), SETTINGS)["status"]) == {"ok"}
    assert 1 <= most <= cores()


def test_the_same_posters_give_the_same_images(tmp_path: Path) -> None:
    tables = []
    for name in ("first", "second"):
        store = Store(tmp_path / name)
        ids = [store.put(path.read_bytes()) for path in sorted(RAW_POSTERS.iterdir())[:8]]
        tables.append(resize_posters(store, posters(*ids), SETTINGS))
    assert tables[0].equals(tables[1])


# -- perceptual hashes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("star_sailor.png", "93e63a29e431e693"),
        ("barley_roadster.jpg", "bd83c2c03f3ec26c"),
        ("copper_liftoff.png", "9b3b3a94944e6565"),
    ],
)
def test_the_perceptual_hash_is_that_of_imagehash(name: str, expected: str) -> None:
    # Expected: `imagehash.phash` of ImageHash 4.3.2.
    with Image.open(RAW_POSTERS / name) as image:
        assert perceptual_hash(image) == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
@pytest.mark.parametrize("size", [(300, 450), (1250, 1875)])
def test_size_mode_and_quality_hardly_change_the_perceptual_hash(
    mode: str, size: tuple[int, int]
) -> None:
    poster = Image.open(RAW_POSTERS / "star_sailor.png").convert("RGB")
    changed = poster.resize(size, Image.Resampling.LANCZOS).convert(mode)
    assert hash_distance(perceptual_hash(poster), perceptual_hash(changed)) <= 4
    worse = Image.open(io.BytesIO(encoded(poster.resize(size), "JPEG", quality=40)))
    assert hash_distance(perceptual_hash(poster), perceptual_hash(worse)) <= 4


def test_a_photo_hashes_as_it_is_shown() -> None:
    poster = Image.open(RAW_POSTERS / "star_sailor.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = poster.transpose(Image.Transpose.ROTATE_90)
    photo = Image.open(io.BytesIO(encoded(stored, exif=exif)))
    assert hash_distance(perceptual_hash(photo), perceptual_hash(poster)) <= 2
    assert hash_distance(perceptual_hash(stored), perceptual_hash(poster)) > 16


def test_different_posters_have_different_perceptual_hashes() -> None:
    hashes = []
    for path in sorted(RAW_POSTERS.iterdir())[:20]:
        with Image.open(path) as image:
            hashes.append(perceptual_hash(image))
    distances = [hash_distance(a, b) for n, a in enumerate(hashes) for b in hashes[:n]]
    assert min(distances) > 4
    assert 24 <= np.median(distances) <= 40
    assert hash_distance("0" * 16, "f" * 16) == 64


def test_plain_pictures_hash_alike() -> None:
    teal = perceptual_hash(Image.new("RGB", (64, 96), "teal"))
    assert teal == perceptual_hash(Image.new("RGB", (640, 960), "pink"))
    assert len(teal) == 16
