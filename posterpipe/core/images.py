"""Posters into training images.

What belongs here: reading image bytes safely, bringing every kind of image to RGB, resizing. What
does not: which files are posters (`landing`) and pictures for people to look at (`gallery`).
"""

from __future__ import annotations

import io
import math
import struct
import threading
from collections.abc import Iterator

import deflate
import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageCms

from posterpipe.core.memory import TOO_LITTLE_MEMORY
from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import NO_PROGRESS, Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.core.training.buckets import bucket_of
from posterpipe.settings import ImageSettings

PREPARE_VERSION = 2
"""Raise it when `prepare` gives other pixels, and the asset's `code_version` with it: then every
training image is made again."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "AVIF")
"""What Pillow may open. Others are refused: some run foreign programs (EPS) or are seldom safe."""

RESIZED_COLUMNS = ["poster_id", "image", "fit", "width", "height", "status", "reason"]

UNREADABLE = "cannot be read"
"""In the reason of a row whose file could not be opened: it may be, the next time."""

_NO_BYTES = f"the poster's bytes {UNREADABLE}"

PAPER = (255, 255, 255)
"""What shows through transparency, and the borders of `pad`."""


LEAST_REDUCED = 2.0
"""A picture is first shrunk by whole factors, which is quick, to no less than this many times the
training size; LANCZOS does the rest. JPEGs are decoded at a half, a quarter or an eighth, which
skips most of the inverse cosine transform; other pictures have their pixels averaged. Against
LANCZOS alone the PSNR is 45 dB and more for posters, 40 and more for the grainiest of them, and 32
for pages of nothing but fine print (see `test_images`)."""

SAVING = 8
"""Images that are being made durable at the same time: a disk takes longer for one than a core
takes to make it, and hardly longer for several."""


_LOOKS = (128, 128)
"""Pixels that are more than enough for a perceptual hash, which looks at 32 x 32."""


class ImageRejected(ValueError):
    """Bytes that are no usable image. The message says why and what to do."""


class TooManyPixels(ImageRejected):
    """An image above `images.max_pixels`, refused by its header.

    `size`: width and height in pixels; `format`: Pillow's name.
    """

    def __init__(self, size: tuple[int, int], image_format: str, max_pixels: int) -> None:
        self.size = size
        self.format = image_format
        super().__init__(
            f"{size[0]}x{size[1]} pixels are more than images.max_pixels = {max_pixels}; "
            "refused without decoding: make the picture smaller, or raise the limit"
        )


_opening = threading.Lock()


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image in some bytes, its pixels not decoded yet.

    Raises TooManyPixels by the header alone, ImageRejected for anything that is no image, and
    MemoryError.
    """
    if not data:
        raise ImageRejected("the file is empty; copy it again")
    # Pillow's own limit is one for the whole process and does not tell the size; it is put aside
    # only while the header is read.
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError as error:
            raise ImageRejected(
                "no image in it: the content is none of PNG, JPEG, BMP, GIF, WebP, TIFF, AVIF, "
                "or its beginning is damaged; copy or export it again, or remove it"
            ) from error
        except MemoryError:
            raise  # which says nothing about the image
        except Exception as error:  # hostile bytes make Pillow raise nearly anything
            raise ImageRejected(f"the header cannot be read ({error}); export it again") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > max_pixels:
        raise TooManyPixels(image.size, format_name(image), max_pixels)
    return image


def format_name(image: Image.Image) -> str:
    """Pillow's name of the format, phones' multi-picture JPEGs being JPEGs."""
    return "JPEG" if image.format == "MPO" else image.format or ""


def decode(image: Image.Image) -> None:
    """Decode all pixels of the first frame. Raises ImageRejected where that fails; MemoryError."""
    try:
        image.load()
    except MemoryError:
        raise  # which says nothing about the image
    except Exception as error:  # as above
        raise ImageRejected(f"cannot be decoded ({error}); copy or export it again") from error


def decode_for_looks(image: Image.Image) -> None:
    """Decode an image far enough for its `perceptual_hash`, and read it to its end.

    JPEGs at a fraction of their size, in half the time: damage is found all the same, and the hash
    is as near to that of the picture without any shrinking. Raises ImageRejected.
    """
    if format_name(image) == "JPEG":
        image.draft(None, _LOOKS)
    decode(image)


def prepare(data: bytes, settings: ImageSettings) -> Image.Image:
    """The training image of a poster's bytes: RGB, `settings.width` x `settings.height`.

    The first frame, turned upright by its EXIF orientation, colours in sRGB, transparency over
    white, resized with LANCZOS. `fit` stretch is what the thesis does. Raises ImageRejected, and
    MemoryError.
    """
    image = open_image(data, settings.max_pixels)
    extent = _decode_smaller(image, settings)
    decode(image)
    try:
        return resize(to_rgb(image), settings, extent, turn_of(image))
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise ImageRejected(f"cannot be converted ({error}); export it again as PNG") from error


def _decode_smaller(image: Image.Image, settings: ImageSettings) -> tuple[float, float] | None:
    """Lets a JPEG be decoded at a fraction of its size, where that leaves enough.

    Returns the width and height of the picture in decoded pixels, with fractions where the last
    pixel is only partly picture; None for what is decoded whole.
    """
    if format_name(image) != "JPEG":
        return None
    size, box = _layout(image.size, settings, turn_of(image))
    needed = [
        math.ceil(LEAST_REDUCED * size[axis] * image.size[axis] / (box[axis + 2] - box[axis]))
        for axis in (0, 1)
    ]
    drafted = image.draft(None, (needed[0], needed[1]))
    return None if drafted is None else (drafted[1][2], drafted[1][3])


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each EXIF orientation asks for."""

_QUARTER_TURNS = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What brings an image upright, by its EXIF orientation; None where it asks nothing.

    Only a decoded image tells for sure: a PNG may say it at its end.
    """
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF makes Pillow raise nearly anything; the pixels are good
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any decoded image in RGB: sRGB, transparency over white, 16 bits to 8. It is not turned."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _transformed(image, lab, srgb)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow knows no direct way from here to RGBA
    if image.mode in ("P", "PA") or image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    image = _to_srgb(image)
    if image.mode == "RGBA":
        paper = Image.new("RGB", image.size, PAPER)
        paper.paste(image, mask=image)
        return paper
    return image if image.mode == "RGB" else image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """A decoded image as it is meant to be looked at: RGB (see `to_rgb`), turned by its EXIF."""
    turn = turn_of(image)
    rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    values = np.asarray(image, dtype=np.float64)
    # No header tells the range of 32-bit values, so the smallest usual range that holds them is
    # taken.
    highest = float(values.max(initial=0.0, where=np.isfinite(values)))
    if image.mode == "F" and highest <= 1.0:
        top = 1.0
    else:
        top = 255.0 if highest <= 255 else 65535.0 if highest <= 65535 else highest
    values = np.clip(np.nan_to_num(values, posinf=top, neginf=0.0), 0.0, top)
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return _transformed(image, source, ImageCms.createProfile("sRGB"), mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a damaged profile, or one of another colour space: as if there were none


def _transformed(
    image: Image.Image, source: object, target: object, mode: str = "RGB"
) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, target, outputMode=mode)  # type: ignore[arg-type]
    if converted is None:
        raise ImageRejected("the colour profile cannot be applied; export it as sRGB")
    return converted


def resize(
    image: Image.Image,
    settings: ImageSettings,
    extent: tuple[float, float] | None = None,
    turn: Image.Transpose | None = None,
) -> Image.Image:
    """An RGB image in the training size, by `settings.fit`; with `bucket`, in that of its bucket.

    `extent`: width and height of the picture in the image's pixels, where it does not fill the last
    ones (see `_decode_smaller`). `turn`: what brings it upright; done last, since a small image is
    quickly turned.
    """
    size, box = _layout(extent or image.size, settings, turn)
    image = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=LEAST_REDUCED)
    if turn is not None:
        image = image.transpose(turn)
    if settings.fit != "pad":
        return image
    canvas = Image.new("RGB", (settings.width, settings.height), PAPER)
    canvas.paste(
        image, ((settings.width - image.width) // 2, (settings.height - image.height) // 2)
    )
    return canvas


def _layout(
    extent: tuple[float, float], settings: ImageSettings, turn: Image.Transpose | None
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """The size to which an image is resized before it is turned, and the part of it that counts.

    `extent`: its width and height. The part: left, top, right, bottom, in the same unit.
    """
    # Everything is centred, so turning by a quarter swaps the axes and nothing else.
    quarter = turn in _QUARTER_TURNS
    across, down = extent[::-1] if quarter else extent
    width, height = settings.width, settings.height
    left = top = 0.0
    if settings.fit == "pad":
        scale = min(width / across, height / down)
        width, height = max(1, round(across * scale)), max(1, round(down * scale))
    elif settings.fit in ("crop", "bucket"):
        if settings.fit == "bucket":
            width, height = bucket_of(across, down, width, height, settings.bucket_step)
        scale = min(across / width, down / height)
        left, top = max(0.0, (across - width * scale) / 2), max(0.0, (down - height * scale) / 2)
    if quarter:
        return (height, width), (top, left, down - top, across - left)
    return (width, height), (left, top, across - left, down - top)


PLAIN_HASHES = ("0" * 16, "8" + "0" * 15)
"""What `perceptual_hash` gives for black, and for any other plain colour."""


def perceptual_hash(image: Image.Image) -> str:
    """What a decoded image looks like, in 64 bits, as 16 hexadecimal digits.

    The signs of the 8x8 lowest frequencies of its discrete cosine transform about their median, in
    grey at 32x32 pixels: the pHash of Zauner, "Implementation and Benchmarking of Perceptual Image
    Hash Functions" (2010), as `imagehash.phash` computes it, whose SciPy is not worth ten lines.
    Another size, format or quality of one picture changes a few bits at most (see
    `hash_distance`). Pictures of one plain colour are all alike (PLAIN_HASHES), and their hash says
    nothing.
    Raises what Pillow raises for pixels that cannot be converted.
    """
    grey = to_rgb(_shrunk(image, (512, 512))).convert("L")
    grey = grey.resize((32, 32), Image.Resampling.LANCZOS)
    turn = turn_of(image)
    if turn is not None:
        grey = grey.transpose(turn)
    places = np.arange(32)
    cosines = np.cos(np.pi * np.outer(places[:8], 2 * places + 1) / 64)
    # Rounded, so that frequencies that are not there are zero on every machine.
    low = np.round(cosines @ np.asarray(grey, dtype=np.float64) @ cosines.T, 6)
    return np.packbits(low > np.median(low)).tobytes().hex()


def hash_distance(a: str, b: str) -> int:
    """Bits, 0 to 64, in which two perceptual hashes differ: unrelated pictures differ in about 32.

    Raises ValueError when one is no hexadecimal number.
    """
    return (int(a, 16) ^ int(b, 16)).bit_count()


def _shrunk(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image boxed down by whole factors to no less than `size`, where its mode can be mixed."""
    factors = (max(1, image.width // size[0]), max(1, image.height // size[1]))
    if factors == (1, 1) or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    return image.reduce(factors)


def png_bytes(image: Image.Image) -> bytes:
    """PNG of the pixels of an RGB image alone: equal pixels give equal bytes, on every machine.

    Pillow weighs five filters for each line and then deflates for long. One filter and libdeflate
    take a tenth of the time, and the file is about as small.
    """
    width, height = image.size
    pixels = np.asarray(image.convert("RGB")).reshape(height, 3 * width)
    lines = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    lines[:, 0] = 1  # "Sub": each pixel less the one to its left
    lines[:, 1:4] = pixels[:, :3]
    np.subtract(pixels[:, 3:], pixels[:, :-3], out=lines[:, 4:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _png_chunk(b"IHDR", header),
            _png_chunk(b"IDAT", bytes(deflate.zlib_compress(lines, 1))),
            _png_chunk(b"IEND", b""),
        )
    )


def _png_chunk(name: bytes, body: bytes) -> bytes:
    checksum = deflate.crc32(body, deflate.crc32(name))
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def resize_key(poster_id: str, settings: ImageSettings) -> str:
    """Key of a training image: the poster's bytes and everything that decides its pixels."""
    return content_key(
        "resized",
        PREPARE_VERSION,
        poster_id,
        settings.width,
        settings.height,
        settings.fit,
        *([settings.bucket_step] if settings.fit == "bucket" else []),
    )


def resize_posters(
    store: Store,
    posters: pd.DataFrame,
    settings: ImageSettings,
    progress: Progress = NO_PROGRESS,
) -> pd.DataFrame:
    """The training image of each usable poster.

    `posters`: the table of `landing.scan`; only rows with status `ok` count. Columns of the result:
    poster_id, image (sha256 of the PNG, at `store.path(image, ".png")`), fit, width, height
    (pixels of the image), status (`ok` or `failed`), reason; sorted by poster_id. An image that
    was made before is not made again; a failed one is tried again, as is one that somebody changed.
    """
    poster_ids = sorted(set(posters.loc[posters["status"] == "ok", "poster_id"]))
    by_key = {resize_key(poster_id, settings): poster_id for poster_id in poster_ids}

    def compute(keys: list[str]) -> Iterator[tuple[str, dict]]:
        with progress.task("resize posters", len(keys), "posters") as tick:
            made = parallel_map(lambda key: _make(store, by_key[key], settings), keys)
            rows = parallel_map(lambda image: _save(store, *image), made, SAVING)
            for key, row in zip(keys, rows, strict=True):
                yield key, row
                tick()

    def usable(row: dict) -> bool:
        return row["status"] == "ok" and store.intact(row["image"], ".png")

    rows = compute_missing(store, "resized", list(by_key), compute, usable=usable)
    return pd.DataFrame(
        [{"poster_id": by_key[key], "fit": settings.fit, **row} for key, row in rows.items()],
        columns=RESIZED_COLUMNS,
    )


def retriable_count(resized: pd.DataFrame) -> int:
    """How many training images of the table above failed in a way that may pass by itself; what
    cannot be decoded or converted stays so."""
    reason = resized["reason"].astype(str)
    passes = reason.str.startswith(_NO_BYTES) | (reason == TOO_LITTLE_MEMORY)
    return int((passes & (resized["status"] == "failed")).sum())


def _make(store: Store, poster_id: str, settings: ImageSettings) -> tuple[dict, bytes]:
    """The row of a training image, and its PNG."""
    try:
        image = prepare(store.path(poster_id).read_bytes(), settings)
    except (ImageRejected, OSError, MemoryError) as error:
        row = {"image": "", "width": 0, "height": 0, "status": "failed"}
        return {**row, "reason": _why_not_made(error)}, b""
    row = {"width": image.width, "height": image.height, "status": "ok", "reason": ""}
    return row, png_bytes(image)


def _why_not_made(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return TOO_LITTLE_MEMORY
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        return f"{_NO_BYTES} ({error.filename}: {said}); materialize raw_posters again"
    return str(error)


def _save(store: Store, row: dict, png: bytes) -> dict:
    return {**row, "image": store.put(png, ".png")} if png else row
