"""Builds the reference from docstrings: `python -m docs.tools.reference`, into docs/_build.

What belongs here: which modules are shown. What does not: their words, which stand in the code.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "_build"

MODULES = (
    "posterpipe",
    "!posterpipe.studio.screens",  # pages of Streamlit run when they are imported
    "!posterpipe.studio.app",
)


def build(target: Path) -> int:
    """Writes the pages below `target`. Raises where pdoc warns; the number of pages."""
    os.environ["POSTERPIPE_PROFILE"] = "starter"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what pdoc says of modules it cannot show
        # Not about us: what libraries say when they are imported.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(?!pdoc)")
        # Nor this, which says that a default is what some variable of this machine holds.
        warnings.filterwarnings("ignore", message="The default value of")
        pdoc.render.configure(docformat="markdown", footer_text="posterpipe")
        pdoc.pdoc(*MODULES, output_directory=target)
    return len(list(target.rglob("*.html")))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET, help="folder of the pages")
    target = parser.parse_args().target
    print(f"{build(target)} pages: {target / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
