"""How the pages look, and how they show what people typed.

What belongs here: plain text without markdown, notices, posters with their buttons, the few rules
of style that Streamlit's theme has no option for. What does not: the theme's colours (`serve`) and
what a page does (`screens`).

What was typed, and what comes from files, is shown with `st.text` alone: Streamlit reads markdown,
LaTeX and emoji codes in nearly every other text, labels and captions included.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import streamlit as st
from PIL import Image, ImageDraw

from posterpipe.studio.painter import Poster

STYLE = """
<style>
  .stMainBlockContainer { max-width: 72rem; padding-top: 4.5rem; padding-bottom: 4rem; }
  /* Typed text: as running text, and never wider than its place. */
  [data-testid="stText"] { font-family: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }
  [class*="st-key-faint"] [data-testid="stText"] { font-size: 0.875rem; opacity: 0.78; }
  [class*="st-key-note"] { border-left: 3px solid #b8862f; padding-left: 0.75rem; }
  [class*="st-key-poster"] img { border-radius: 4px; box-shadow: 0 8px 28px rgb(0 0 0 / 18%); }
  [class*="st-key-empty"] { border: 1px dashed rgb(128 128 128 / 45%); border-radius: 8px;
    padding: 3.5rem 1.5rem; }
  [class*="st-key-empty"] h2 { font-size: 1.5rem; }
  /* While a poster is drawn the page runs on; the progress bar tells that better. */
  [data-testid="stStatusWidget"] { display: none; }
  /* Two posters stay beside each other on a phone. */
  [class*="st-key-pair"] [data-testid="stHorizontalBlock"] { flex-wrap: nowrap; gap: 0.75rem; }
  [class*="st-key-pair"] [data-testid="stColumn"] { min-width: 0; flex: 1 1 0; }
  @media (prefers-reduced-motion: reduce) { * { animation: none !important;
    transition: none !important; } }
</style>
"""
"""Fixed text of this module: nothing typed is ever part of it."""


@lru_cache(maxsize=1)
def icon() -> Image.Image:
    """The page's icon, a poster with a sun: Streamlit's own icons are fetched from the network."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((12, 2, 52, 62), 6, fill=(47, 93, 98))
    draw.ellipse((20, 12, 44, 36), fill=(242, 193, 78))
    draw.rectangle((18, 46, 46, 51), fill=(251, 250, 247))
    return image


def dress() -> None:
    """Apply the rules of style to the page."""
    st.html(STYLE)


def faint(text: str, key: str) -> None:
    """Small plain text, as typed. `key`: its place on the page, like no other's."""
    with st.container(key=f"faint-{key}"):
        st.text(text)


def note(text: str, key: str) -> None:
    """A sentence that is to be noticed, as plain text."""
    with st.container(key=f"note-{key}"):
        st.text(text)


def empty(heading: str, text: str, key: str) -> None:
    """What stands where there is nothing yet. Both texts are ours, not typed."""
    with st.container(key=f"empty-{key}", gap="xsmall"):
        st.header(heading, anchor=False, text_alignment="center")
        st.text(text, text_alignment="center")


def file_name(poster: Poster) -> str:
    """What a saved poster is called: its title or description, letters of every script and digits,
    then who drew it, and the seed."""
    text = unicodedata.normalize("NFKC", poster.title or poster.order.description).lower()
    # Letters, digits, and the marks without which letters of many scripts are others.
    kept = "".join(sign if unicodedata.category(sign)[0] in "LNM" else " " for sign in text)
    slug = "-".join(kept.split())[:48].strip("-")
    model = "base" if poster.choice.kind == "base" else poster.choice.name[:8]
    return f"{slug or 'poster'}-{model}-{poster.seed}.png"


def alt_text(poster: Poster) -> str:
    """What a poster shows, for who cannot see it."""
    title = f", titled {poster.title}" if poster.title else ""
    return f"Poster drawn from: {poster.order.description}{title}"


def told(poster: Poster) -> str:
    """One line about a poster: model, score, seed."""
    score = "" if poster.score is None else f" · CLIP fit {poster.score:.3f}"
    model = "base model" if poster.choice.kind == "base" else poster.choice.name[:8]
    return f"{model}{score} · seed {poster.seed}"
