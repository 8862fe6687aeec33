"""Posters into training images.

What belongs here: reading image bytes safely, bringing every kind of image to RGB, resizing. What
does not: which files are posters (`landing`) and pictures for people to look at (`gallery`).
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import numpy as np
import pandas as pd
from PIL import Image, ImageCms, ImageOps

from posterpipe.core.parallel import parallel_map
from posterpipe.core.progress import NoProgress, Progress
from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.settings import ImageSettings

PREPARE_VERSION = 1
"""Raise it when `prepare` gives other pixels: every training image is then made again."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "AVIF")
"""What Pillow may open. Others are refused: some run foreign programs (EPS) or are seldom safe."""

RESIZED_COLUMNS = ["poster_id", "image", "fit", "width", "height", "status", "reason"]

PAPER = (255, 255, 255)
"""What shows through transparency, and the borders of `pad`."""


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

    Raises TooManyPixels by the header alone, and ImageRejected for anything that is no image.
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
                "no image in it: the content is none of PNG, JPEG, BMP, GIF, WebP, TIFF, AVIF; "
                "export it again or remove it"
            ) from error
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
    """Decode all pixels of the first frame. Raises ImageRejected when that fails."""
    try:
        image.load()
    except Exception as error:  # as above
        raise ImageRejected(f"cannot be decoded ({error}); copy or export it again") from error


def prepare(data: bytes, settings: ImageSettings) -> Image.Image:
    """The training image of a poster's bytes: RGB, `settings.width` x `settings.height`.

    The first frame, turned upright by its EXIF orientation, colours in sRGB, transparency over
    white, resized with LANCZOS. `fit` stretch is what the thesis does. Raises ImageRejected.
    """
    image = open_image(data, settings.max_pixels)
    decode(image)
    try:
        return resize(to_rgb(image), settings)
    except Exception as error:  # as above
        raise ImageRejected(f"cannot be converted ({error}); export it again as PNG") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any decoded image in RGB: upright, sRGB, transparency over white, 16 bits to 8."""
    image = ImageOps.exif_transpose(image)
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
        paper = Image.new("RGBA", image.size, (*PAPER, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    # No header tells the range of 32-bit values, so the smallest usual range that holds them is
    # taken; "I;16" is always 16-bit.
    highest = float(values.max(initial=0.0))
    if image.mode.startswith("I;16"):
        top = 65535.0
    elif image.mode == "F" and highest <= 1.0:
        top = 1.0
    else:
        top = 255.0 if highest <= 255 else 65535.0 if highest <= 65535 else highest
    return Image.fromarray(np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8))


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


def resize(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """An RGB image in the training size, by `settings.fit`."""
    width, height = settings.width, settings.height
    lanczos = Image.Resampling.LANCZOS
    if settings.fit == "stretch":
        return image.resize((width, height), lanczos)
    if settings.fit == "crop":
        scale = min(image.width / width, image.height / height)
        left = (image.width - width * scale) / 2
        top = (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        return image.resize((width, height), lanczos, box=box)
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (width, height), PAPER)
    place = ((width - inner[0]) // 2, (height - inner[1]) // 2)
    canvas.paste(image.resize(inner, lanczos), place)
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    """PNG of the pixels alone; with one version of Pillow, equal pixels give equal bytes."""
    bare = Image.frombytes(image.mode, image.size, image.tobytes())  # no profile, no text
    buffer = io.BytesIO()
    bare.save(buffer, format="PNG")
    return buffer.getvalue()


def resize_key(poster_id: str, settings: ImageSettings) -> str:
    """Key of a training image: the poster's bytes and everything that decides its pixels."""
    return content_key(
        "resized", PREPARE_VERSION, poster_id, settings.width, settings.height, settings.fit
    )


def resize_posters(
    store: Store,
    posters: pd.DataFrame,
    settings: ImageSettings,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The training image of each usable poster.

    `posters`: the table of `landing.scan`; only rows with status `ok` count. Columns of the result:
    poster_id, image (sha256 of the PNG, at `store.path(image, ".png")`), fit, width, height
    (pixels of the image), status (`ok` or `failed`), reason; sorted by poster_id. An image that
    was made before is not made again; a failed one is tried again.
    """
    progress = progress or NoProgress()
    poster_ids = sorted(set(posters.loc[posters["status"] == "ok", "poster_id"]))
    by_key = {resize_key(poster_id, settings): poster_id for poster_id in poster_ids}

    def compute(keys: list[str]) -> Iterator[tuple[str, dict]]:
        with progress.task("resize posters", len(keys), "posters") as tick:
            rows = parallel_map(lambda key: _resize_one(store, by_key[key], settings), keys)
            for key, row in zip(keys, rows, strict=True):
                yield key, row
                tick()

    def usable(row: dict) -> bool:
        return row["status"] == "ok" and store.has(row["image"], ".png")

    rows = compute_missing(store, "resized", list(by_key), compute, usable=usable)
    return pd.DataFrame(
        [{"poster_id": by_key[key], "fit": settings.fit, **row} for key, row in rows.items()],
        columns=RESIZED_COLUMNS,
    )


def _resize_one(store: Store, poster_id: str, settings: ImageSettings) -> dict:
    try:
        image = prepare(store.path(poster_id).read_bytes(), settings)
    except (ImageRejected, OSError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = f"{store.path(poster_id)} is gone; materialize raw_posters again"
        return {"image": "", "width": 0, "height": 0, "status": "failed", "reason": reason}
    image_blob = store.put(png_bytes(image), ".png")
    return {
        "image": image_blob,
        "width": image.width,
        "height": image.height,
        "status": "ok",
        "reason": "",
    }
