"""Files that a landing folder should never hold and one day does.

What belongs here: how each kind of file is made, and what must become of it. What does not: running
the pipeline over them (`test_torture`) and the finer points of colours (`test_images`).

Most pictures show four quadrants of four colours, so that one look tells whether a picture was
turned, mirrored or taken for one of another colour space. Nothing is encoded on import.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

Colour = tuple[int, int, int]
Look = tuple[Colour, Colour, Colour, Colour]
"""Colours of the quadrants: top left, top right, bottom left, bottom right."""

MAX_PIXELS = 20_000_000
"""What the tests set `images.max_pixels` to, so that bombs stay small."""
MIN_SIDE = 64

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
QUADRANTS: Look = ((200, 40, 40), (40, 170, 60), (40, 70, 200), (240, 220, 150))
SIZE = (96, 144)


@dataclass(frozen=True)
class Case:
    """One kind of file.

    `kind` names the test. `path` is where the file lies in the landing folder, `name` what the
    tables call it. `write` gets the full path. `status` is that of its row in `raw_posters`, or
    None where there must be no row; `reason` is a regular expression for its reason. `look`: what
    its training image shows, within `tolerance` levels of 255; None where anything will do.
    """

    kind: str
    path: str
    write: Callable[[Path], object]
    status: str | None = "ok"
    reason: str = ""
    look: Look | None = None
    tolerance: int = 12
    name: str = ""

    @property
    def source_name(self) -> str:
        """What the table calls it."""
        return self.name or self.path


def quadrants(
    mode: str = "RGB", size: tuple[int, int] = SIZE, look: Look = QUADRANTS
) -> Image.Image:
    """The four colours, in a mode that Pillow converts to by itself."""
    width, height = size
    image = Image.new("RGB", size)
    for number, colour in enumerate(look):
        left, top = number % 2 * (width // 2), number // 2 * (height // 2)
        image.paste(colour, (left, top, left + width - width // 2, top + height - height // 2))
    return image.quantize(16) if mode == "P" else image.convert(mode)


def greys(look: Look = QUADRANTS) -> Look:
    """A look without its colours, by the luma that Pillow uses."""
    levels = [round((299 * r + 587 * g + 114 * b) / 1000) for r, g, b in look]
    return tuple((level, level, level) for level in levels)  # type: ignore[return-value]


def over_white(look: Look = QUADRANTS) -> Look:
    """A look whose first quadrant is transparent."""
    return (WHITE, *look[1:])


def noise(mode: str = "RGB", size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Pixels that no format can make small, so that every tenth of a file counts."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    """An image as a file of some format."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def cases() -> list[Case]:
    """All kinds, in no particular order. No two have the same path."""
    return [
        *_modes(),
        *_transparent(),
        *_deep(),
        *_profiles(),
        *_orientations(),
        *_encodings(),
        *_several_frames(),
        *_truncated(),
        *_damaged(),
        *_no_images(),
        *_bombs(),
        *_sizes(),
        *_names(),
        *_places(),
    ]


EXTENSION = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "BMP": ".bmp",
    "GIF": ".gif",
    "WEBP": ".webp",
    "TIFF": ".tif",
    "AVIF": ".avif",
    "MPO": ".jpeg",
}
FINE: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "MPO": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}
"""Options with which a format keeps the colours."""


def _picture(
    kind: str,
    image_format: str,
    make: Callable[[], Image.Image],
    look: Look | None = QUADRANTS,
    tolerance: int = 12,
    **options: object,
) -> Case:
    """A good picture: what `make` gives, in that format."""
    options = {**FINE.get(image_format, {}), **options}

    def write(path: Path) -> None:
        path.write_bytes(encoded(make(), image_format, **options))

    return Case(
        kind, kind.replace(" ", "_") + EXTENSION[image_format], write, "ok", "", look, tolerance
    )


def _bytes(
    kind: str,
    make: Callable[[], bytes],
    status: str | None,
    reason: str = "",
    look: Look | None = None,
    extension: str = ".png",
) -> Case:
    path = kind.replace(" ", "_").replace("/", "_") + extension
    return Case(kind, path, lambda path: path.write_bytes(make()), status, reason, look)


# -- good pictures --------------------------------------------------------------------------------

_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P"),
    "WEBP": ("L", "LA", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"),
    "AVIF": ("L", "LA", "RGB", "RGBA"),
}
_BITS: Look = (BLACK, WHITE, WHITE, BLACK)


def _in_mode(mode: str) -> Image.Image:
    if mode == "1":
        return quadrants("1", look=_BITS)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(quadrants(), srgb, lab, outputMode="LAB")
        assert converted is not None
        return converted
    # Some formats keep an opaque picture as one without alpha; another size tells them apart.
    return quadrants(mode, (98, 144) if mode.endswith("A") else SIZE)


def _modes() -> Iterator[Case]:
    for image_format, modes in _MODES.items():
        for mode in modes:
            look = {"1": _BITS, "L": greys(), "LA": greys()}.get(mode, QUADRANTS)
            kind = f"{image_format} {mode}"
            yield _picture(kind, image_format, lambda mode=mode: _in_mode(mode), look)  # type: ignore[misc]


def _see_through(mode: str) -> Image.Image:
    image = quadrants("RGBA")
    image.paste((90, 90, 90, 0), (0, 0, SIZE[0] // 2, SIZE[1] // 2))
    return image.convert(mode)


def _keyed(mode: str, size: tuple[int, int] = SIZE) -> tuple[Image.Image, object]:
    """An opaque picture and the colour of its first quadrant, which the file calls transparent."""
    image = quadrants(mode, size)
    return image, image.getpixel((0, 0))


def _transparent() -> Iterator[Case]:
    for image_format in ("PNG", "WEBP", "TIFF", "AVIF"):
        kind = f"{image_format} RGBA transparent"
        yield _picture(kind, image_format, lambda: _see_through("RGBA"), over_white())
    for image_format in ("PNG", "TIFF"):
        kind = f"{image_format} LA transparent"
        yield _picture(kind, image_format, lambda: _see_through("LA"), over_white(greys()))
    for image_format, mode in (("PNG", "P"), ("PNG", "L"), ("PNG", "RGB"), ("GIF", "P")):
        look = over_white(greys() if mode == "L" else QUADRANTS)

        def write(path: Path, image_format: str = image_format, mode: str = mode) -> None:
            image, colour = _keyed(mode)
            path.write_bytes(encoded(image, image_format, transparency=colour))

        kind = f"{image_format} {mode} with a transparent colour"
        path = kind.replace(" ", "_") + EXTENSION[image_format]
        yield Case(kind, path, write, "ok", "", look)

    def alphas(path: Path) -> None:
        image, index = _keyed("P", (98, 144))
        table = bytearray(b"\xff" * 256)
        assert isinstance(index, int)
        table[index] = 0
        path.write_bytes(encoded(image, "PNG", transparency=bytes(table)))

    yield Case("PNG P with alphas", "PNG_P_with_alphas.png", alphas, "ok", "", over_white())
    yield _picture(
        "PNG all transparent",
        "PNG",
        lambda: Image.new("RGBA", SIZE, (200, 40, 40, 0)),
        (WHITE, WHITE, WHITE, WHITE),
    )


def _deep() -> Iterator[Case]:
    def sixteen() -> np.ndarray:
        return np.asarray(quadrants("L"), dtype=np.uint16) * 257

    for image_format in ("PNG", "TIFF"):
        yield _picture(
            f"{image_format} I;16", image_format, lambda: Image.fromarray(sixteen()), greys()
        )

    def thirty_two() -> Image.Image:
        values = sixteen().astype(np.int32)
        values[0, 0] = 65535  # tells the range
        return Image.fromarray(values)

    yield _picture("TIFF I", "TIFF", thirty_two, greys())

    def floats(top: float) -> Image.Image:
        values = np.asarray(quadrants("L"), dtype=np.float32) * np.float32(top / 255)
        values[0, 0] = top
        return Image.fromarray(values)

    yield _picture("TIFF F up to 1", "TIFF", lambda: floats(1.0), greys())
    yield _picture("TIFF F up to 255", "TIFF", lambda: floats(255.0), greys())

    def unreal() -> Image.Image:
        values = np.asarray(quadrants("L"), dtype=np.float32) / np.float32(255)
        values[:2, 0] = (np.nan, -np.inf)
        return Image.fromarray(values)

    yield _picture("TIFF F with NaN", "TIFF", unreal, greys())

    def big_endian() -> Image.Image:
        return Image.frombytes("I;16B", SIZE, sixteen().astype(">u2").tobytes())

    yield _picture("TIFF I;16B", "TIFF", big_endian, greys())
    yield _bytes("PNG RGB of 16 bits", _png_of_16_bits, "ok", look=QUADRANTS)
    for bits in (1, 2, 4):
        image_bits = bits

        def few(bits: int = image_bits) -> Image.Image:
            return quadrants(size=(90 + bits, 144), look=_BITS).quantize(2**bits)

        yield _picture(f"PNG P of {bits} bits", "PNG", few, _BITS, bits=bits)


# -- profiles -------------------------------------------------------------------------------------

# Primaries in XYZ under D50: sRGB's as IEC 61966-2-1 gives them and ICC adapts them, Adobe RGB's
# from its specification (1998). Columns are red, green, blue.
_SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
_ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
_ADOBE_GAMMA = 563 / 256


def _s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def icc_profile(space: bytes, curve: float, primaries: np.ndarray | None = None) -> bytes:
    """A minimal ICC v2 display profile: `RGB ` with its primaries, or `GRAY`, of one gamma."""
    text = b"test profile"
    xyz = b"XYZ \0\0\0\0"
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(curve * 256)) + b"\0\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + bytes(78)
    tags = {
        b"desc": description + bytes(-len(description) % 4),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz + _s15(0.9642) + _s15(1.0) + _s15(0.8249),
    }
    if primaries is None:
        tags[b"kTRC"] = gamma
    else:
        for number, name in enumerate((b"r", b"g", b"b")):
            tags[name + b"XYZ"] = xyz + b"".join(_s15(v) for v in primaries[:, number])
            tags[name + b"TRC"] = gamma
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s12s4s4sI4s4sQI12s",
        *(offset + len(body), b"\0\0\0\0", 0x02100000, b"mntr", space, b"XYZ ", bytes(12)),
        *(b"acsp", b"\0\0\0\0", 0, b"\0\0\0\0", b"\0\0\0\0", 0, 0),
        _s15(0.9642) + _s15(1.0) + _s15(0.8249),
    )
    return header + bytes(128 - len(header)) + table + body


def _linear(colour: Colour) -> np.ndarray:
    value = np.array(colour) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _in_adobe_rgb() -> Look:
    """The numbers that show the usual quadrants when they are read as Adobe RGB."""
    found = []
    for colour in QUADRANTS:
        light = np.linalg.solve(_ADOBE, _SRGB @ _linear(colour))
        stored = np.clip(light, 0, 1) ** (1 / _ADOBE_GAMMA) * 255
        found.append(tuple(int(v) for v in np.rint(stored)))
    return tuple(found)  # type: ignore[return-value]


def _srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _with_profile(
    kind: str, image_format: str, make: Callable[[], Image.Image], profile: Callable[[], bytes]
) -> Case:
    def write(path: Path) -> None:
        options = {**FINE.get(image_format, {}), "icc_profile": profile()}
        path.write_bytes(encoded(make(), image_format, **options))

    path = kind.replace(" ", "_") + EXTENSION[image_format]
    return Case(kind, path, write, "ok", "", greys() if "grey" in kind else QUADRANTS)


def _profiles() -> Iterator[Case]:
    def wide() -> bytes:
        return icc_profile(b"RGB ", _ADOBE_GAMMA, _ADOBE)

    def wide_picture() -> Image.Image:
        return quadrants(look=_in_adobe_rgb())

    def linear_grey() -> Image.Image:
        levels = np.asarray(quadrants("L")) / 255
        light = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
        return Image.fromarray(np.rint(light * 255).astype(np.uint8))

    for image_format in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        yield _with_profile(f"{image_format} sRGB profile", image_format, quadrants, _srgb_profile)
        yield _with_profile(f"{image_format} wide profile", image_format, wide_picture, wide)
        broken = f"{image_format} broken profile"
        yield _with_profile(broken, image_format, quadrants, lambda: b"no profile")
    yield _with_profile(
        "PNG grey with a linear profile", "PNG", linear_grey, lambda: icc_profile(b"GRAY", 1.0)
    )
    yield _with_profile("JPEG cut profile", "JPEG", quadrants, lambda: _srgb_profile()[:200])
    yield _with_profile(
        "JPEG profile of another space", "JPEG", quadrants, lambda: icc_profile(b"GRAY", 1.0)
    )
    yield _with_profile(
        "TIFF CMYK with an RGB profile", "TIFF", lambda: quadrants("CMYK"), _srgb_profile
    )


# -- orientation ----------------------------------------------------------------------------------

_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores an upright picture that it marks with each orientation."""


def _orientations() -> Iterator[Case]:
    for image_format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        for orientation in range(1, 9):

            def write(
                path: Path, image_format: str = image_format, orientation: int = orientation
            ) -> None:
                image = quadrants(size=(94, 144))
                if orientation in _STORED:
                    image = image.transpose(_STORED[orientation])
                exif = Image.Exif()
                exif[0x0112] = orientation
                options = {**FINE.get(image_format, {}), "exif": exif}
                path.write_bytes(encoded(image, image_format, **options))

            kind = f"{image_format} orientation {orientation}"
            path = kind.replace(" ", "_") + EXTENSION[image_format]
            yield Case(kind, path, write, "ok", "", QUADRANTS)

    def meaningless() -> bytes:
        exif = Image.Exif()
        exif[0x0112] = 99
        return encoded(quadrants(), "PNG", exif=exif)

    yield _bytes("orientation 99", meaningless, "ok", look=QUADRANTS)

    def large_photo() -> Image.Image:
        """Odd sides, and large enough that a part of it is decoded only."""
        return quadrants(size=(2047, 1365), look=_sideways()).convert("RGB")

    exif = Image.Exif()
    exif[0x0112] = 6
    yield _picture("JPEG large and on its side", "JPEG", large_photo, exif=exif)


def _sideways() -> Look:
    """The quadrants as they are stored under orientation 6: turned by a quarter to the left."""
    top_left, top_right, bottom_left, bottom_right = QUADRANTS
    return (top_right, bottom_right, top_left, bottom_left)


# -- encodings ------------------------------------------------------------------------------------


def _chunk(name: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def _png(
    size: tuple[int, int],
    lines: bytes,
    *,
    depth: int = 8,
    colour: int = 2,
    interlace: int = 0,
    before: bytes = b"",
) -> bytes:
    """A PNG of filtered lines; `before` holds chunks that come before the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            before,
            _chunk(b"IDAT", zlib.compress(lines)),
            _chunk(b"IEND", b""),
        )
    )


def _lines(pixels: np.ndarray) -> bytes:
    """Rows of pixels, each with the filter "None" in front."""
    rows = pixels.reshape(pixels.shape[0], -1).view(np.uint8)
    return np.pad(rows, ((0, 0), (1, 0))).tobytes()


def _png_of_16_bits() -> bytes:
    pixels = (np.asarray(quadrants()).astype(np.uint16) * 257).astype(">u2")
    return _png(SIZE, _lines(pixels), depth=16)


def _interlaced_png() -> bytes:
    """Adam7: seven passes, each (first column, first row, columns apart, rows apart)."""
    pixels = np.asarray(quadrants())
    passes = (
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    )
    parts = [np.ascontiguousarray(pixels[y::down, x::across]) for x, y, across, down in passes]
    return _png(SIZE, b"".join(map(_lines, parts)), interlace=1)


def _encodings() -> Iterator[Case]:
    yield _bytes("PNG interlaced", _interlaced_png, "ok", look=QUADRANTS)
    yield _picture("PNG stored without compression", "PNG", quadrants, compress_level=0)
    yield _picture("JPEG progressive", "JPEG", quadrants, progressive=True)
    yield _picture("JPEG with half the colours", "JPEG", quadrants, subsampling=2)
    yield _picture("JPEG of low quality", "JPEG", quadrants, tolerance=24, quality=10)
    yield _picture("JPEG in RGB", "JPEG", quadrants, keep_rgb=True)
    yield _picture("JPEG with restarts", "JPEG", quadrants, restart_marker_blocks=2)
    yield _picture("JPEG CMYK progressive", "JPEG", lambda: quadrants("CMYK"), progressive=True)
    yield _picture("JPEG of large size", "JPEG", lambda: quadrants(size=(1401, 2101)))
    yield _picture("GIF not interlaced", "GIF", lambda: quadrants("P"), interlace=0)
    yield _picture("WEBP lossy", "WEBP", quadrants, tolerance=24, lossless=False, quality=90)
    yield _picture("AVIF with half the colours", "AVIF", quadrants, subsampling="4:2:0")
    for compression in (
        "tiff_lzw",
        "tiff_adobe_deflate",
        "packbits",
        "jpeg",
        "zstd",
        "lzma",
    ):
        # JPEG in TIFF loses some of the colours.
        kind = f"TIFF {compression}"
        yield _picture(kind, "TIFF", quadrants, tolerance=24, compression=compression)
    fax = lambda: _in_mode("1")  # noqa: E731
    yield _picture("TIFF group4", "TIFF", fax, _BITS, compression="group4")
    yield _picture("TIFF big", "TIFF", quadrants, big_tiff=True)
    yield _picture("TIFF in strips", "TIFF", quadrants, compression="packbits", strip_size=960)


def _frames(mode: str = "RGB") -> list[Image.Image]:
    other = (QUADRANTS[3], QUADRANTS[2], QUADRANTS[1], QUADRANTS[0])
    return [quadrants(mode), quadrants(mode, look=other)]


def _several_frames() -> Iterator[Case]:
    for image_format in ("GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"):

        def write(path: Path, image_format: str = image_format) -> None:
            first, second = _frames("P" if image_format == "GIF" else "RGB")
            options = {**FINE.get(image_format, {}), "save_all": True, "append_images": [second]}
            path.write_bytes(encoded(first, image_format, **options))

        kind = f"{image_format} of two frames"
        path = kind.replace(" ", "_") + EXTENSION[image_format]
        yield Case(kind, path, write, "ok", "", QUADRANTS)

    def third_frame_cut() -> bytes:
        data = encoded(_frames("P")[0], "GIF", save_all=True, append_images=[noise("P")])
        return data[:-2000]

    # Only the first frame is used, and it is whole.
    yield _bytes(
        "GIF cut in a later frame", third_frame_cut, "ok", look=QUADRANTS, extension=".gif"
    )


# -- damage ---------------------------------------------------------------------------------------

_CUT = r"(cannot be decoded|the header cannot be read|no image in it).*(copy|export)"


def _truncated() -> Iterator[Case]:
    kinds: dict[str, tuple[str, dict[str, object]]] = {
        "JPEG": ("JPEG", {"quality": 90}),
        "progressive JPEG": ("JPEG", {"quality": 90, "progressive": True}),
        "PNG": ("PNG", {}),
        "WEBP": ("WEBP", {"quality": 90}),
        "lossless WEBP": ("WEBP", {"lossless": True}),
        "GIF": ("GIF", {}),
        "BMP": ("BMP", {}),
        "TIFF": ("TIFF", {}),
        "compressed TIFF": ("TIFF", {"compression": "tiff_lzw"}),
        "AVIF": ("AVIF", {"quality": 80}),
    }
    for name, (image_format, options) in kinds.items():
        for tenth in range(1, 10):

            def cut(
                image_format: str = image_format,
                options: dict[str, object] = options,
                tenth: int = tenth,
            ) -> bytes:
                image = noise("P" if image_format == "GIF" else "RGB")
                data = encoded(image, image_format, **options)
                return data[: len(data) * tenth // 10]

            kind = f"{name} cut at {tenth} tenths"
            yield _bytes(kind, cut, "rejected", _CUT, extension=EXTENSION[image_format])


def _patched_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header tells another size."""
    data = bytearray(encoded(quadrants(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _spoilt(data: bytes, place: float, length: int = 64) -> bytes:
    """Zeros in the middle of a file."""
    start = int(len(data) * place)
    return data[:start] + bytes(length) + data[start + length :]


def _damaged() -> Iterator[Case]:
    def broken_exif() -> bytes:
        return encoded(
            quadrants(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage", **FINE["JPEG"]
        )

    yield _bytes("JPEG with broken EXIF", broken_exif, "ok", look=QUADRANTS, extension=".jpg")
    for image_format in ("PNG", "WEBP"):
        yield _bytes(
            f"{image_format} whose EXIF is no EXIF",
            partial(
                encoded,
                quadrants(),
                image_format,
                exif=b"Exif\0\0garbage!",
                **FINE.get(image_format, {}),
            ),
            "ok",
            look=QUADRANTS,
            extension=f".{image_format.lower()}",
        )

    def trailing() -> bytes:
        return encoded(quadrants(), "JPEG", **FINE["JPEG"]) + b"\0garbage" * 1000

    yield _bytes("JPEG with bytes behind it", trailing, "ok", look=QUADRANTS, extension=".jpg")
    yield _bytes(
        "JPEG with bytes before it",
        lambda: b"garbage\0" * 9 + encoded(quadrants(), "JPEG"),
        "rejected",
        "no image in it",
        extension=".jpg",
    )
    # It ends as a whole JPEG does, so that libjpeg takes it: the missing rows are grey.
    yield _bytes(
        "JPEG taller than its pixels",
        lambda: _patched_jpeg(96, 4000),
        "ok",
        extension=".jpg",
    )
    yield _bytes(
        "PNG with zeros in its pixels",
        lambda: _spoilt(encoded(noise(), "PNG"), 0.5),
        "rejected",
        _CUT,
    )
    yield _bytes(
        "PNG with a wrong checksum in its header",
        lambda: _spoilt(encoded(noise(seed=1), "PNG"), 29 / len(encoded(noise(seed=1), "PNG")), 4),
        "rejected",
        _CUT,
    )
    yield _bytes(
        "PNG without pixels",
        lambda: _png(SIZE, b""),
        "rejected",
        _CUT,
    )
    yield _bytes(
        "PNG of no width",
        lambda: _png((0, 144), b""),
        "rejected",
        r"(cannot be decoded|the header cannot be read|no image in it)",
    )
    yield _bytes(
        "TIFF that points behind its end",
        lambda: b"II*\0\xff\xff\xff\x7f" + bytes(100),
        "rejected",
        _CUT,
        extension=".tif",
    )

    def loop() -> bytes:
        data = bytearray(encoded(quadrants(), "TIFF"))
        offset = struct.unpack("<I", data[4:8])[0]
        entries = struct.unpack("<H", data[offset : offset + 2])[0]
        following = offset + 2 + 12 * entries
        data[following : following + 4] = struct.pack("<I", offset)
        return bytes(data)

    # Its second page is its first: only that one is read.
    yield _bytes("TIFF whose pages run in a circle", loop, "ok", look=QUADRANTS, extension=".tif")
    for name, data in {
        "JPEG": b"\xff\xd8\xff",
        "PNG": b"\x89PNG\r\n\x1a\n",
        "GIF": b"GIF89a",
        "BMP": b"BM",
        "TIFF": b"II*\0",
        "WEBP": b"RIFF\x10\0\0\0WEBP",
        "AVIF": b"\0\0\0\x1cftypavif",
    }.items():
        yield _bytes(
            f"{name} of its first bytes only",
            lambda data=data: data,  # type: ignore[misc]
            "rejected",
            _CUT,
            extension=EXTENSION[name],
        )


_NO_IMAGE = r"no image in it.*copy or export it again"


def _no_images() -> Iterator[Case]:
    yield _bytes("zero bytes", lambda: b"", "rejected", "the file is empty; copy")
    yield _bytes("one byte", lambda: b"\0", "rejected", _NO_IMAGE)
    yield _bytes("zeros only", lambda: bytes(10_000), "rejected", _NO_IMAGE)
    contents = {
        "plain text": b"This is a poster, believe me.\n",
        "web page instead of the picture": b"<!DOCTYPE html><html><body>404</body></html>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="96" height="144"/>',
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 144\nshowpage\n",
        "ZIP": b"PK\x03\x04" + bytes(60),
        "Photoshop file": b"8BPS\0\x01" + bytes(60),
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
        "video": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(60),
        "program": b"\x7fELF\x02\x01\x01" + bytes(60),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }
    for name, data in contents.items():
        yield _bytes(
            f"{name} with a picture's extension",
            lambda data=data: data,  # type: ignore[misc]
            "rejected",
            _NO_IMAGE,
            extension=".jpg",
        )
    for image_format in ("ICO", "PPM", "TGA", "JPEG2000"):
        yield _bytes(
            f"{image_format} with a picture's extension",
            lambda name=image_format: encoded(quadrants(), name),  # type: ignore[misc]
            "rejected",
            _NO_IMAGE,
            extension=".png",
        )
    for image_format, extension in (("PNG", ".jpg"), ("JPEG", ".png"), ("WEBP", ".gif")):

        def misnamed(image_format: str = image_format) -> bytes:
            options = FINE.get(image_format, {})
            return encoded(quadrants(size=(100, 144)), image_format, **options)

        kind = f"{image_format} called {extension}"
        yield _bytes(kind, misnamed, "ok", look=QUADRANTS, extension=extension)
    foreign = r": not one of \.png, .*export it as PNG or remove it"
    for extension in (".psd", ".heic", ".svg", ".pdf", ".zip", ".exe", ".jpg~", ".png.bak"):
        yield _bytes(
            f"a file called {extension}", lambda: b"whatever", "rejected", foreign, None, extension
        )
    yield _bytes(
        "a picture without extension",
        lambda: encoded(quadrants(), "PNG", compress_level=3),
        "rejected",
        f"no extension{foreign}",
        extension="",
    )


# -- bombs ----------------------------------------------------------------------------------------

_TOO_MANY = (
    rf"\d+x\d+ pixels are more than images\.max_pixels = {MAX_PIXELS}.*make the picture smaller"
)


def _bombs() -> Iterator[Case]:
    def of_one_bit(width: int, height: int) -> bytes:
        line = bytes(1 + (width + 7) // 8)
        return _png((width, height), line * height, depth=1, colour=0)

    yield _bytes("PNG bomb", lambda: of_one_bit(5000, 5000), "rejected", _TOO_MANY)
    yield _bytes(
        "PNG that promises 2 billion columns",
        lambda: _png((2**31 - 1, 2**31 - 1), b""),
        "rejected",
        _TOO_MANY,
    )
    # 18 million pixels in 20 kilobytes: below the limit, so it is decoded; its reds are one red.
    line = b"\0" + bytes((200, 40, 40)) * 4000
    yield _bytes(
        "PNG of very many equal pixels",
        lambda: _png((4000, 4500), line * 4500),
        "ok",
        look=(QUADRANTS[0],) * 4,
    )

    def inflating() -> bytes:
        """A small picture whose compressed pixels go on for 200 megabytes."""
        packer = zlib.compressobj(9)
        body = packer.compress(_lines(np.asarray(quadrants())))
        for _ in range(200):
            body += packer.compress(bytes(2**20))
        body += packer.flush()
        whole = _png(SIZE, b"")
        start = whole.index(b"IDAT") - 4
        return whole[:start] + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")

    yield _bytes("PNG that inflates for ever", inflating, "ok", look=QUADRANTS)

    def texts(name: bytes) -> bytes:
        note = name + b"\0\0" + zlib.compress(bytes(100 * 2**20), 9)
        chunk = b"iCCP" if name == b"profile" else b"zTXt"
        pixels = np.asarray(quadrants())
        return _png(SIZE, _lines(pixels), before=_chunk(chunk, note))

    unreadable = r"the header cannot be read|no image in it"
    yield _bytes("PNG with a text bomb", lambda: texts(b"Comment"), "rejected", unreadable)
    yield _bytes("PNG with a profile bomb", lambda: texts(b"profile"), "rejected", unreadable)
    yield _bytes(
        "JPEG that promises 4 billion pixels",
        lambda: _patched_jpeg(65500, 65500),
        "rejected",
        _TOO_MANY,
        extension=".jpg",
    )

    def gif() -> bytes:
        data = bytearray(encoded(quadrants("P"), "GIF"))
        data[6:10] = struct.pack("<HH", 65535, 65535)
        return bytes(data)

    yield _bytes("GIF bomb", gif, "rejected", _TOO_MANY, extension=".gif")

    def bmp() -> bytes:
        data = bytearray(encoded(quadrants(), "BMP"))
        data[18:26] = struct.pack("<ii", 100_000, 100_000)
        return bytes(data)

    yield _bytes("BMP bomb", bmp, "rejected", _TOO_MANY, extension=".bmp")

    def tiff() -> bytes:
        small = encoded(Image.new("1", (5000, 5000)), "TIFF", compression="group4")
        return small

    yield _bytes("TIFF bomb", tiff, "rejected", _TOO_MANY, extension=".tif")

    def webp() -> bytes:
        return encoded(Image.new("L", (16383, 1300)), "WEBP", quality=0, method=0)

    yield _bytes("WEBP bomb", webp, "rejected", _TOO_MANY, extension=".webp")


def _sizes() -> Iterator[Case]:
    small = rf"a side is below images\.min_side = {MIN_SIDE}; use a larger picture"
    for width, height, status, reason in (
        (1, 1, "rejected", small),
        (63, 96, "rejected", small),
        (64, 64, "ok", ""),
        (1, 5000, "rejected", small),
        (20_000, 64, "ok", ""),
        (64, 20_000, "ok", ""),
    ):
        yield _bytes(
            f"{width}x{height} pixels",
            lambda size=(width, height): encoded(quadrants(size=size), "PNG"),  # type: ignore[misc]
            status,
            reason,
            QUADRANTS if status == "ok" else None,
        )
    yield Case(
        "JPEG very long and thin",
        "very_long.jpg",
        lambda path: path.write_bytes(encoded(quadrants(size=(64, 65_500)), "JPEG")),
        "ok",
        "",
        QUADRANTS,
    )


# -- names and places -----------------------------------------------------------------------------


def _own(number: int) -> Callable[[Path], object]:
    """A picture that no other file has."""

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(quadrants(size=(100 + number, 150)), "PNG"))

    return write


def _names() -> Iterator[Case]:
    names = {
        "spaces": "a name with spaces .png",
        "composed letters": unicodedata.normalize(
            "NFC", "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png"
        ),
        "decomposed letters": unicodedata.normalize(
            "NFD", "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png"
        ),
        "another script": "\N{CJK UNIFIED IDEOGRAPH-6D77}\N{CJK UNIFIED IDEOGRAPH-5831}.png",
        "an emoji": "\N{ROCKET}.png",
        "text from right to left": "\N{RIGHT-TO-LEFT OVERRIDE}gnp.png",
        "a newline": "two\nlines.png",
        "a tab": "a\ttab.png",
        "an escape": "\x1b[31mred.png",
        "a leading dash": "-rf.png",
        "quotes": '"it\'s".png',
        "a backslash": "back\\slash.png",
        "per cent": "100%20%s{}.png",
        "wildcards": "*?[a].png",
        "a shell command": "$(reboot);`id`|&.png",
        "a formula": "=1+1.png",
        "markdown": "| # <b>[x](y)</b>.png",
        "a word of Windows": "CON.png",
        "255 bytes": "n" * 251 + ".png",
        "255 bytes of wide letters": "\N{CJK UNIFIED IDEOGRAPH-6D77}" * 83 + "aa.png",
        "capitals": "SHOUTED.PNG",
        "two extensions": "poster.jpg.png",
        "no stem": "folder/..png.png",
        "two dots": "folder2/a..png",
    }
    for number, (kind, path) in enumerate(names.items()):
        hidden = Path(path).name.startswith(".")
        status, look = (None, None) if hidden else ("ok", QUADRANTS)
        yield Case(f"a name with {kind}", path, _own(number), status, "", look)
    invalid = os.fsdecode(b"latin-1 caf\xe9.png")
    shown = "latin-1 caf\N{REPLACEMENT CHARACTER}.png"
    yield Case("a name that is no UTF-8", invalid, _own(100), "ok", "", QUADRANTS, name=shown)


def _linked(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def _places() -> Iterator[Case]:
    yield Case("nested folders", "a/b/c/d/e/f/nested.png", _own(120), "ok", "", QUADRANTS)
    yield Case("a folder called .png", "folder.png/inside.png", _own(121), "ok", "", QUADRANTS)
    yield Case("an empty folder called .png", "empty.png", lambda path: path.mkdir(), None)
    yield Case("a hidden file", ".hidden.png", _own(122), None)
    yield Case("a hidden folder", ".thumbnails/inside.png", _own(123), None)
    for extension in (".txt", ".csv", ".json", ".md", ".part", ".tmp"):
        kind = f"notes beside posters, {extension}"
        yield Case(kind, f"notes{extension}", lambda path: path.write_text("a caption"), None)

    def same(path: Path) -> None:
        path.write_bytes(encoded(quadrants(size=(130, 150)), "PNG"))

    yield Case("a picture that lies here twice", "twice_a.png", same, "ok", "", QUADRANTS)
    copied = r"same bytes as twice_a\.png"
    yield Case("a copy", "twice_b.png", same, "duplicate", copied)
    yield Case("a link to a file here", "twice_c.png", _linked("twice_a.png"), "duplicate", copied)

    def hard_link(path: Path) -> None:
        original = path.with_name("twice_a.png")
        same(original)
        path.hardlink_to(original)

    yield Case("a hard link", "twice_d.png", hard_link, "duplicate", copied)

    def outwards(path: Path) -> None:
        outside = path.parent.parent / "outside"
        outside.mkdir(exist_ok=True)
        (outside / "poster.png").write_bytes(encoded(quadrants(size=(131, 150)), "PNG"))
        path.symlink_to(outside / "poster.png")

    # A link to a file is that file, wherever it lies: a folder of links is a usual way to choose.
    yield Case("a link out of the folder", "link_out.png", outwards, "ok", "", QUADRANTS)

    def outwards_folder(path: Path) -> None:
        outside = path.parent.parent / "outside_folder"
        outside.mkdir(exist_ok=True)
        (outside / "poster.png").write_bytes(encoded(quadrants(size=(132, 150)), "PNG"))
        path.symlink_to(outside)

    folder = "a link to a folder, which is not followed; copy the folder here"
    yield Case("a link to a folder outside", "link_folder", outwards_folder, "rejected", folder)
    yield Case("a link to its own folder", "link_here", _linked("."), "rejected", folder)
    yield Case("a link to a folder above", "deep/link_up", _up, "rejected", folder)
    unreadable = r"cannot be read \(.+\); .*remove it"
    yield Case("a dangling link", "dangling.png", _linked("nowhere.png"), "rejected", unreadable)
    yield Case("a link to itself", "loop.png", _linked("loop.png"), "rejected", unreadable)
    yield Case("links in a circle", "loop_a.png", _circle, "rejected", unreadable)
    yield Case("links in a circle, back", "loop_b.png", _nothing, "rejected", unreadable)
    yield Case("a link to a device", "device.png", _linked("/dev/zero"), None)
    yield Case("a pipe", "pipe.png", lambda path: os.mkfifo(path), None)
    yield Case("a socket", "socket.png", _socket, None)

    def forbidden(path: Path) -> None:
        _own(140)(path)
        path.chmod(0)

    # Root may read it all the same; `test_torture` looks at it as another user as well.
    yield Case("a file that may not be read", "forbidden.png", forbidden, _if_forbidden("rejected"))

    def locked(path: Path) -> None:
        _own(141)(path)
        path.parent.chmod(0)

    status = _if_forbidden("rejected")
    name = "locked/inside.png" if status == "ok" else "locked"
    yield Case("a folder that may not be entered", "locked/inside.png", locked, status, name=name)


def _if_forbidden(status: str) -> str:
    """That status for everybody but root, to whom permissions mean nothing."""
    return "ok" if os.geteuid() == 0 else status


def _up(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("..")


def _circle(path: Path) -> None:
    path.symlink_to("loop_b.png")
    path.with_name("loop_b.png").symlink_to("loop_a.png")


def _nothing(path: Path) -> None:
    """The file came with another one."""


def _socket(path: Path) -> None:
    # Addresses of sockets are short; a link to the folder of a descriptor makes them so.
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{handle}/{path.name}")
    finally:
        os.close(handle)


def write_all(folder: Path, chosen: list[Case]) -> None:
    """Writes the files of these cases into an empty folder."""
    for case in chosen:
        path = folder / case.path
        path.parent.mkdir(parents=True, exist_ok=True)
        case.write(path)
