"""The gallery: every prompt with its variants, and how other pages link into it.

What belongs here: what stands on its pages, and addresses. What does not: markup and style
(`gallery.html.j2`), the viewer (`report.js`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import (
    TUNED,
    Prompt,
    Published,
    Shot,
    Stored,
    variant_name,
)
from posterpipe.core.score_report.pictures import Picture, Pictures
from posterpipe.core.score_report.words import cut

GALLERY_FILE = "gallery.html"

IMAGES_A_PAGE = 1_200
"""Images of one page: what Chromium scrolls without a pause; more go to further pages."""


def slug_of(prompt_id: str) -> str:
    """The address of a prompt on its page: its id, or, where that is no plain name, one like it."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", prompt_id):
        return prompt_id
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", prompt_id)[:40].strip("-")
    return f"p-{plain}-{hashlib.sha256(prompt_id.encode()).hexdigest()[:8]}"


def _gallery_chunks(published: Published) -> list[list[Prompt]]:
    chunks: list[list[Prompt]] = []
    size = 0
    for prompt in published.prompts:
        if not chunks or size + len(prompt.shots) > IMAGES_A_PAGE:
            chunks.append([])
            size = 0
        chunks[-1].append(prompt)
        size += len(prompt.shots)
    return chunks or [[]]


def _gallery_file(index: int) -> str:
    return GALLERY_FILE if index == 0 else f"gallery-{index + 1}.html"


def gallery_files(published: Published) -> dict[str, str]:
    """On which page each prompt stands."""
    return {
        prompt.prompt_id: _gallery_file(index)
        for index, chunk in enumerate(_gallery_chunks(published))
        for prompt in chunk
    }


def gallery_contexts(published: Published, pictures: Pictures) -> list[tuple[str, dict[str, Any]]]:
    """For `gallery.html.j2`: the file of each page with the images of its prompts, and on every one
    all prompts by their effect, the least first."""
    chunks = _gallery_chunks(published)
    files = gallery_files(published)
    ranked = sorted(
        (prompt for prompt in published.prompts if prompt.effect is not None),
        key=lambda prompt: (prompt.effect or 0.0, prompt.prompt_id),
    )
    scale = charts.row_scale([n for p in ranked for n in p.effects], include=(0.0,))
    losses = [
        {
            "prompt_id": prompt.prompt_id,
            "href": f"{files[prompt.prompt_id]}#{slug_of(prompt.prompt_id)}",
            "effect": prompt.effect,
            "plot": charts.dots_row(prompt.effects, prompt.effect, scale, variant=TUNED),
        }
        for prompt in ranked
    ]
    pages = [
        {
            "file": _gallery_file(index),
            "first": chunk[0].prompt_id if chunk else "",
            "last": chunk[-1].prompt_id if chunk else "",
        }
        for index, chunk in enumerate(chunks)
    ]
    rendered = []
    for index, chunk in enumerate(chunks):
        most_seeds = max((len(prompt.seeds) for prompt in chunk), default=0)
        rendered.append(
            (
                _gallery_file(index),
                {
                    "prompts": [_prompt(prompt, published, pictures) for prompt in chunk],
                    "losses": losses,
                    "losses_axis": charts.axis_row(scale, sign=True),
                    "page_number": index + 1,
                    "page_count": len(chunks),
                    "gallery_pages": pages,
                    "most_seeds": most_seeds,
                    "seed_css": _seed_css(most_seeds),
                    "any_titled": any(
                        picture_of(pictures, shot.titled)
                        for prompt in chunk
                        for shot in prompt.shots.values()
                    ),
                },
            )
        )
    return rendered


def _seed_css(count: int) -> Markup:
    """Shows the panel of the seed that is chosen, without scripts."""
    chosen = [
        f'.prompt:has(.seeds input[data-i="{index}"]:checked) .shots[data-i="{index}"]'
        for index in range(count)
    ]
    return Markup(",\n").join(
        [*map(Markup, chosen), Markup(".prompt:not(:has(.seeds)) .shots")]
    ) + (Markup(" { display: grid; }"))


def _prompt(prompt: Prompt, published: Published, pictures: Pictures) -> dict[str, Any]:
    return {
        "slug": slug_of(prompt.prompt_id),
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.prompt,
        "score_text": prompt.score_text,
        "title": prompt.title,
        "negative": prompt.negative,
        "effect": prompt.effect,
        "lowest": prompt.lowest,
        "words": cut(f"{prompt.prompt_id} {prompt.prompt}".lower(), 500),
        "panels": [
            {
                "seed": seed,
                "shots": [
                    _shot(prompt, prompt.shots[seed, variant], pictures)
                    for variant in published.variants
                    if (seed, variant) in prompt.shots
                ],
            }
            for seed in prompt.seeds
        ],
    }


_STATUS_WORDS = {
    "ok": "The file is gone", "blocked": "Blocked", "failed": "Not drawn",
}  # fmt: skip


def _shot(prompt: Prompt, shot: Shot, pictures: Pictures) -> dict[str, Any]:
    picture = picture_of(pictures, shot.image)
    copied = shot.nearest if shot.nearest and shot.nearest.copied else None
    reason = shot.reason
    if not picture and not reason:
        reason = "it is no longer in the store"
    return {
        "variant": shot.variant,
        "name": variant_name(shot.variant),
        "status": shot.status,
        "status_word": _STATUS_WORDS.get(shot.status, shot.status),
        "reason": cut(reason, 200),
        "cosine": shot.cosine,
        "difference": shot.difference,
        "specific": shot.specific,
        "picture": picture,
        "titled": picture_of(pictures, shot.titled),
        "copied": copied is not None,
        "nearest": picture_of(pictures, copied.poster) if copied else None,
        "nearest_name": copied.name if copied else "",
        "nearest_cosine": copied.cosine if copied else None,
        "nearest_bits": copied.hash_distance if copied else None,
        "alt": alt_text(prompt, shot.variant, shot.seed),
    }


def picture_of(pictures: Pictures, stored: Stored | None) -> Picture | None:
    """The files of a stored image; None where there is none, or its file is gone."""
    return pictures.get(stored.blob) if stored else None


def alt_text(prompt: Prompt, variant: str, seed: int) -> str:
    """An image in words, for who does not see it."""
    return f"{variant_name(variant)}, seed {seed}: {cut(prompt.score_text or prompt.prompt, 120)}"


def shot_address(files: Mapping[str, str], prompt: Prompt, seed: int) -> str:
    """Where the images of a prompt and seed stand, relative to the report; `files` as of
    `gallery_files`."""
    return f"{files[prompt.prompt_id]}#{slug_of(prompt.prompt_id)}/{seed}"
