"""The report's typefaces, cut down to the letters of European languages, inside its folder.

What belongs here: subsetting and `fonts.css`. What does not: type sizes (`static/report.css`) and
titles on posters (`core.typography`).

Both families are under the SIL Open Font License, which allows this; letters that they lack come
from the reader's own fonts.
"""

from __future__ import annotations

import io
import shutil
from functools import lru_cache
from importlib.metadata import files as package_files
from importlib.metadata import version as installed_version
from pathlib import Path

from posterpipe.core.store import content_key

_FACES = (
    ("Report Serif", 400, "font-source-serif-pro", "SourceSerifPro-Regular.ttf", "serif-400"),
    ("Report Serif", 600, "font-source-serif-pro", "SourceSerifPro-Semibold.ttf", "serif-600"),
    ("Report Sans", 400, "font-hanken-grotesk", "HankenGrotesk-Regular.otf", "sans-400"),
    ("Report Sans", 600, "font-hanken-grotesk", "HankenGrotesk-SemiBold.otf", "sans-600"),
)
"""Family, weight, package, file, name in the report."""

_LETTERS = [*range(0x20, 0x7F), *range(0xA0, 0x180), 0x218, 0x219, 0x21A, 0x21B,
            0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2018, 0x2019, 0x201A, 0x201C, 0x201D, 0x201E,
            0x2022, 0x2026, 0x2030, 0x2032, 0x2033, 0x20AC, 0x2122, 0x2190, 0x2192, 0x2212, 0x2215,
            0x00D7, 0x2248, 0x2264, 0x2265]  # fmt: skip


_FEATURES = ["kern", "liga", "lnum", "tnum", "mark", "mkmk", "ccmp", "locl"]


def write_fonts(folder: Path, before: Path) -> None:
    """`fonts.css` and its files into `folder`; those of the report `before` are taken over.

    A face that cannot be made is left out: the page then shows the reader's own font.
    """
    rules = []
    for family, weight, package, file, name in _FACES:
        made = content_key(installed_version(package), file, _LETTERS, _FEATURES)[:8]
        target = folder / f"{name}-{made}.woff"
        if (before / target.name).exists():
            shutil.copyfile(before / target.name, target)
        else:
            data = _subset(package, file)
            if data is None:
                continue
            target.write_bytes(data)
        rules.append(
            f'@font-face {{ font-family: "{family}"; font-weight: {weight}; font-style: normal; '
            f'font-display: swap; src: url("{target.name}") format("woff"); }}\n'
        )
    (folder / "fonts.css").write_text("".join(rules), "utf-8")


@lru_cache(maxsize=8)
def _subset(package: str, file: str) -> bytes | None:
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont, TTLibError

    found = next((one for one in package_files(package) or [] if one.name == file), None)
    if found is None:
        return None
    options = Options()
    options.layout_features = _FEATURES
    options.flavor = "woff"  # woff2 would need a further package
    options.name_IDs = [0, 1, 2, 13, 14]  # family, copyright and licence
    options.notdef_outline = True
    try:
        font = TTFont(str(found.locate()))
        subsetter = Subsetter(options)
        subsetter.populate(unicodes=_LETTERS)
        subsetter.subset(font)
        font.flavor = "woff"
        buffer = io.BytesIO()
        font.save(buffer)
    except (OSError, TTLibError):
        return None
    return buffer.getvalue()
