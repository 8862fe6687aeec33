"""Whether titles can be read, as drawn and as set in type.

What belongs here: what stands on the page. What does not: markup and style (`legibility.html.j2`).
"""

from __future__ import annotations

from typing import Any

from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import (
    BASELINE,
    TUNED,
    Published,
    number,
    text,
    variant_name,
    variant_order,
)
from posterpipe.core.score_report.gallery_pages import (
    alt_text,
    gallery_files,
    picture_of,
    shot_address,
)
from posterpipe.core.score_report.pictures import Pictures
from posterpipe.core.score_report.words import (
    ROWS_SHOWN,
    count,
    first_of,
    heads,
    interval,
    rounded,
    share,
    shares,
)

TITLES_SHOWN = 24


def legibility_context(published: Published, pictures: Pictures) -> dict[str, Any]:
    """For `legibility.html.j2`: how many titles can be read, drawn or set in type, and examples."""
    table = published.rows("legibility")
    lettering = {"set": "set in type", "drawn": "as drawn"}
    rows = [
        {
            "variant": text(row["variant"]),
            "name": variant_name(text(row["variant"])),
            "lettering": lettering.get(text(row["lettering"]), text(row["lettering"])),
            "exact": f"{count(row, 'exact')} of {count(row, 'images')}",
            "share": share(row["exact_share"]),
            "interval": shares(row, "exact_low_95", "exact_high_95"),
            "bar": charts.share_bar(
                number(row["exact_share"]), css=charts.variant_class(text(row["variant"]))
            ),
            "distance": rounded(row["mean_distance"]),
            "distance_interval": interval(
                row, "distance_low_95", "distance_high_95", of="mean_distance"
            ),
            "prompts": count(row, "prompts"),
        }
        for row in sorted(
            table,
            key=lambda row: (row["lettering"] != "drawn", variant_order(text(row["variant"]))),
        )
    ]
    found, asked = (
        sum(count(row, name) for row in table if row["lettering"] == "set")
        for name in ("exact", "images")
    )
    drawn, drawn_asked = (
        sum(count(row, name) for row in table if row["lettering"] == "drawn")
        for name in ("exact", "images")
    )
    headline = "Titles have not been read yet"
    if asked:
        headline = f"{share(found / asked)} of the set titles are read exactly"
        if drawn_asked:
            headline += f", {share(drawn / drawn_asked)} of the drawn ones"
    elif drawn_asked:
        headline = f"{share(drawn / drawn_asked)} of the drawn titles are read exactly"
    elif rows:
        headline = "No title is in letters that the reader knows"
    unknown = max((count(row, "unknown_titles") for row in table), default=0)
    misread = [
        [prompt.prompt_id, variant_name(shot.variant), shot.seed, prompt.title,
         shot.read.get("set") or "nothing", charts.plain(shot.distance["set"], 2)]
        for prompt, shot in published.shots
        if shot.distance.get("set", 0.0) > 0
    ]  # fmt: skip
    readers = sorted({text(row["reader"]) for row in table})
    return {
        "headline": headline,
        "rows": rows,
        "unknown": _unknown_told(unknown),
        "caption": f"Reader: {', '.join(readers)}" if readers else "",
        "examples": _title_examples(published, pictures),
        "misread": misread[:ROWS_SHOWN],
        "misread_columns": heads("Prompt", "Variant", "#Seed", "Title", "Read", "#Distance"),
        "misread_told": first_of(misread),
    }


def _unknown_told(titles: int) -> str:
    """Of how many titles the reader cannot say whether they are legible; "" for none."""
    if not titles:
        return ""
    told = "1 title is" if titles == 1 else f"{titles} titles are"
    return (
        f"{told} in letters that the reader does not know: it cannot say whether they can be read, "
        "and no number here counts them. Look at the posters."
    )


def _title_examples(published: Published, pictures: Pictures) -> list[dict[str, Any]]:
    """The first seed of every prompt, of the fine-tuned model where there is one."""
    files = gallery_files(published)
    cards = []
    for prompt in published.prompts:
        seed = prompt.seeds[0]
        shot = prompt.shots.get((seed, TUNED)) or prompt.shots.get((seed, BASELINE))
        if shot is None:
            continue
        drawn, titled = picture_of(pictures, shot.image), picture_of(pictures, shot.titled)
        if drawn is None or titled is None:
            continue
        cards.append(
            {
                "title": prompt.title,
                "href": shot_address(files, prompt, seed),
                "drawn": drawn,
                "drawn_alt": f"As drawn: {alt_text(prompt, shot.variant, seed)}",
                "set": titled,
                "set_alt": f"With the title {prompt.title} set in type",
                "read_drawn": shot.read.get("drawn"),
                "read_set": shot.read.get("set"),
            }
        )
    return cards[:TITLES_SHOWN]
