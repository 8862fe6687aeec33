"""The first page: leaderboard, growth, effects, trend, the best and the worst.

What belongs here: what stands on it. What does not: markup and style (`index.html.j2`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from posterpipe.core import thesis
from posterpipe.core.prompts import shared_seeds
from posterpipe.core.score_report import charts
from posterpipe.core.score_report.data import (
    BASELINE,
    TUNED,
    Prompt,
    Published,
    Row,
    number,
    text,
    variant_name,
    variant_order,
)
from posterpipe.core.score_report.gallery_pages import (
    alt_text,
    gallery_files,
    picture_of,
    slug_of,
)
from posterpipe.core.score_report.headline import RANK, control_context, headline
from posterpipe.core.score_report.pictures import Pictures
from posterpipe.core.score_report.standing import standing_of
from posterpipe.core.score_report.words import (
    ALIKE,
    BETTER,
    DASH,
    DECIDED,
    change,
    count,
    cut,
    day,
    interval,
    moment,
    plural,
    resting,
    rounded,
    share,
    short,
    verdict,
)


def first_words(published: Published) -> tuple[str, str]:
    """What the report says first: a title, and sentences with the numbers."""
    return headline(published, {text(row["variant"]): row for row in _by_headline(published)})


def index_context(published: Published, pictures: Pictures) -> dict[str, Any]:
    """For `index.html.j2`: what the scores say, from the headline to single prompts."""
    board = {text(row["variant"]): row for row in _by_headline(published)}
    title, lede = headline(published, board)
    growth, growth_rows = _growth(board)
    first = board.get(TUNED) or board.get(BASELINE)
    return {
        "images": len(published.shots),
        "headline": title,
        "lede": lede,
        "standing": _standing(published, board),
        "byline": _byline(published),
        "figures": _key_figures(board),
        "growth": growth,
        "growth_rows": growth_rows,
        "scales": thesis.SCALES,
        "n_prompts": plural(count(first, "prompts"), "prompt"),
        **control_context(published, board),
        "boards": _boards(published),
        "effects": _effects(published),
        "design_told": _design_told(published),
        "trends": _trends(published),
        "extremes": _extremes(published, pictures),
        "extremes_told": _extremes_told(published),
    }


def _by_headline(published: Published) -> list[Row]:
    """The rows of the leaderboard by the metric that variants are ranked by, in order."""
    rows = [
        row
        for row in published.rows("leaderboard")
        if row["metric_id"] == published.headline_metric
    ]
    return sorted(rows, key=lambda row: variant_order(text(row["variant"])))


def _standing(published: Published, board: Mapping[str, Row]) -> dict[str, Any] | None:
    """Which checkpoint is shown, what the gate said of it, and which one is served; None without
    one."""
    if TUNED not in board:
        return None
    shown = text(board[TUNED]["checkpoint_id"])
    found = standing_of(published)
    return {
        "checkpoint": short(shown),
        "known": found is not None,
        "word": found.word if found else "",
        "css": found.css if found else "",
        "href": found.href if found else "",
        "is_served": found is not None and found.served == shown,
        "served": short(found.served) if found else "",
        "pinned_by": found.pinned_by if found else "",
    }


def _byline(published: Published) -> list[str]:
    if not published.shots:
        return []
    told = [f"Scores of {moment(published.scored_at)}"] if published.scored_at else []
    seeds = {len(prompt.seeds) for prompt in published.prompts}
    each = f", {plural(seeds.pop(), 'seed')} each" if len(seeds) == 1 else ""
    told.append(f"{plural(len(published.prompts), 'prompt')}{each}")
    told.append(f"{len(published.shots)} images")
    if published.headline_metric:
        told.append(f"Metric {published.headline_metric}")
    return told


def _key_figures(board: Mapping[str, Row]) -> list[dict[str, str]]:
    return [
        {
            "name": variant_name(variant),
            "value": rounded(row["mean"]),
            "note": interval(row, "low_95", "high_95", of="mean"),
        }
        for variant, row in board.items()
    ]


def _growth(board: Mapping[str, Row]) -> tuple[Markup | None, list[dict[str, str]]]:
    """The thesis's chart from the leaderboard, with the thesis's numbers beside."""
    points, beside, rows = [], [], []
    for variant, (_, reported) in thesis.VARIANTS.items():
        row = board.get(variant)
        if row is None:
            continue
        mean, low, high = (
            number(row[n]) for n in ("clip_score", "clip_score_low_95", "clip_score_high_95")
        )
        label = variant_name(variant).replace(" + ", "|+ ")
        points.append(charts.Point(label, mean, low, high, variant))
        beside.append(charts.Point(f"{variant_name(variant)} in the thesis", reported))
        rows.append(
            {
                "variant": variant,
                "name": variant_name(variant),
                "here": charts.plain(mean, 2) if mean is not None else DASH,
                "interval": (
                    f"{charts.plain(low, 2)} to {charts.plain(high, 2)}"
                    if low is not None and high is not None
                    else DASH
                ),
                "thesis": charts.plain(reported, 2),
            }
        )
    if len(points) < 2:
        return None, rows
    chart = charts.points_chart(
        "growth-chart", "CLIP score by variant, here and in the thesis", points, beside=beside,
        include=(0.0,), unit="score",
    )  # fmt: skip
    return chart, rows


def _boards(published: Published) -> list[dict[str, Any]]:
    """The metric that variants are ranked by, then the other kinds of CLIP-T and its control."""
    main = published.headline_metric
    groups = _by_metric(published.rows("leaderboard"))
    return [
        _board(metric_id, rows, published.to_baseline(metric_id))
        for metric_id, rows in groups
        if metric_id == main or metric_id.startswith("clip_")
    ]


def _by_metric(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """In the order of the mart, the metric that variants are ranked by first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(text(row["metric_id"]), []).append(row)
    return sorted(groups.items(), key=lambda one: not one[1][0]["is_headline"])


def _board(metric_id: str, rows: Sequence[Row], effects: Mapping[str, Row]) -> dict[str, Any]:
    """One metric of the leaderboard, with its marks; `effects`: of `paired_effects`, by variant."""
    ranked = sorted(rows, key=lambda row: variant_order(text(row["variant"])))
    scale = charts.row_scale(
        (number(row[n]) for row in rows for n in ("mean", "low_95", "high_95")),
        within=_range_of(metric_id),
    )
    shown = []
    for row in ranked:
        variant = text(row["variant"])
        mean, low, high = (number(row[n]) for n in ("mean", "low_95", "high_95"))
        difference = number(row["diff_to_sd"])
        prompts, compared = count(row, "prompts"), count(row, "diff_prompts")
        fewer = difference is not None and compared < prompts
        shown.append(
            {
                "variant": variant,
                "name": variant_name(variant),
                "mean": charts.plain(mean) if mean is not None else DASH,
                "interval": interval(row, "low_95", "high_95", of="mean"),
                "plot": charts.interval_row(mean, low, high, scale, variant=variant),
                "difference": charts.signed(difference) if difference is not None else DASH,
                "difference_interval": interval(row, "diff_low_95", "diff_high_95", sign=True),
                "css": verdict(effects.get(variant)),
                "prompts": f"{prompts} ({compared} to base)" if fewer else f"{prompts}",
                "images": count(row, "images"),
                "missing": count(row, "blocked") + count(row, "failed"),
            }
        )
    return {
        "metric_id": metric_id,
        "name": text(rows[0]["metric"]),
        "better": BETTER.get(text(rows[0]["better"]), ""),
        "rows": shown,
        "axis": charts.axis_row(scale),
    }


def _range_of(metric_id: str) -> tuple[float, float]:
    """The values that a metric may have: shares, and distances of titles, lie between 0 and 1."""
    return (0.0, 1.0) if metric_id.startswith(("title_", f"{RANK}.")) else (-math.inf, math.inf)


def _effects(published: Published) -> list[dict[str, Any]]:
    """One table a metric."""
    return [_effect_table(*one) for one in _by_metric(published.rows("paired_effects"))]


def _effect_table(metric_id: str, rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    by = text(first["scale"])
    same = 1.0 if by == "ratio" else 0.0
    scale = charts.row_scale((n for row in rows for n in _places(row, same)), include=(same,))
    shown = [_effect_cells(row, by, scale, same) for row in rows]
    return {
        "metric_id": metric_id,
        "name": text(first["metric"]),
        "better": BETTER.get(text(first["better"]), ""),
        "rows": shown,
        "axis": charts.axis_row(scale, sign=by != "ratio"),
        "note": _effect_note(rows, by, alike=any(cells["interval"] == ALIKE for cells in shown)),
    }


def _places(row: Row, same: float) -> list[float | None]:
    """Of an effect and its interval on the axis, where `same` is no difference."""
    values = [number(row[name]) for name in ("mean_difference", "low_95", "high_95")]
    return [None if value is None else value + same for value in values]


def _effect_cells(row: Row, by: str, scale: charts.Scale, same: float) -> dict[str, Any]:
    """One row of a table of effects, in words and as marks."""
    mean, low, high = _places(row, same)
    question = text(row["question"])
    variant = BASELINE if text(row["comparison"]).startswith("negative on base") else TUNED
    win = share(row["win_rate"])
    wins = number(row["win_low_95"]), number(row["win_high_95"])
    if wins[0] is not None and wins[1] is not None:
        win += f" ({100 * wins[0]:.0f} to {100 * wins[1]:.0f})"
    return {
        "name": question[:1].upper() + question[1:],
        "primary": bool(row["is_primary"]),
        "difference": change(row["mean_difference"], by),
        "interval": interval(row, "low_95", "high_95", sign=True, of="mean_difference", scale=by),
        "plot": charts.interval_row(mean, low, high, scale, variant=variant, zero=same),
        "finding": text(row["finding"]),
        "rests": resting(row),
        "p": f"{_p_value(row['p_value'])} · {_p_value(row['p_adjusted'])}",
        "css": verdict(row),
        "size": rounded(row["effect_size"], 2),
        "win": win,
        "detectable": (
            change(row["detectable_difference"], by)
            if by == "ratio"
            else rounded(row["detectable_difference"])
        ),
        "n": f"{count(row, 'prompts')} · {count(row, 'pairs')}",
    }


def _effect_note(rows: Sequence[Row], by: str, *, alike: bool) -> str:
    """How to read a table of effects; `alike`: where one has no interval."""
    note = ""
    if by == "ratio":
        note = (
            "Told as ratios of geometric means over prompts: × 1 is no difference, × 0.80 a fifth "
            "less. Prompts differ so much by this metric that one of them would decide an "
            "arithmetic mean. "
        )
    note += _finds(rows, by)
    if rows[0]["family"] == "guard":
        note += (
            "This metric watches for harm: “not told apart” does not say that there is none, nor "
            "that it is safe. Read the interval. "
        )
    if any(text(row["rests_on"]) for row in rows):
        note += (
            "What rests on one prompt has three fifths of its spread and more from that prompt. "
            "Another suite may have none like it, or two, so that its interval says little; it is "
            "called higher or lower only where it is so without that prompt, too. "
        )
    if alike:
        note += (
            "Where all prompts differ by the same there is no interval: such a sample does not say "
            "how other prompts would vary, nor which difference it would find."
        )
    return note.strip()


def _design_told(published: Published) -> list[str]:
    """What of the suite's design the effects depend on, where it is not as it should be."""
    told = []
    without = sum(not prompt.negative for prompt in published.prompts)
    if without and any("_negative" in variant for variant in published.variants):
        told.append(
            f"{without} of {plural(len(published.prompts), 'prompt')} have no negative prompt: "
            "with and without it their images are the same, so that they are left out of every "
            "comparison that names it."
        )
    shared = shared_seeds({prompt.prompt_id: prompt.seeds for prompt in published.prompts})
    if shared:
        told.append(
            f"{plural(len(shared), 'seed')} serve several prompts each, "
            f"{min(shared)} for instance. Images from the same noise have more in common than "
            "the intervals know, which take prompts for independent: they may be too narrow."
        )
    return told


def _p_value(value: Any) -> str:
    """A p-value to the digits that say something."""
    p = number(value)
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _trends(published: Published) -> list[dict[str, Any]]:
    """One chart a metric that has judged a fine-tuned checkpoint."""
    trends = [
        _trend(index, rows)
        for index, (_, rows) in enumerate(_by_metric(published.rows("checkpoint_trend")))
    ]
    return [trend for trend in trends if trend]


def _trend(index: int, rows: Sequence[Row]) -> dict[str, Any] | None:
    tuned = [row for row in rows if row["kind"] == "tuned" and row["variant"] == TUNED]
    if not tuned:
        return None
    base = next(
        (r for r in rows if r["kind"] == "base" and r["variant"] == BASELINE and r["is_current"]),
        None,
    )
    metric = text(rows[0]["metric"])
    return {
        "name": metric,
        "headline": bool(rows[0]["is_headline"]),
        "chart": charts.points_chart(
            f"trend-{index}",
            f"{metric} by checkpoint",
            [_checkpoint_point(row) for row in tuned],
            reference=_mean_point(f"Base {rounded(base['mean'], 2)}", base) if base else None,
            within=_range_of(text(rows[0]["metric_id"])),
        ),
        "caption": _trend_caption(metric, tuned),
        "rows": [_trend_cells(row) for row in rows],
    }


def _mean_point(label: str, row: Row, note: str = "") -> charts.Point:
    """The mean of a row of `checkpoint_trend`, with its interval."""
    mean, low, high = (number(row[name]) for name in ("mean", "low_95", "high_95"))
    return charts.Point(label, mean, low, high, text(row["variant"]), note)


def _checkpoint_point(row: Row) -> charts.Point:
    label = f"{short(row['checkpoint_id'], 7)}|{day(row['trained_at'])}"
    decided = DECIDED.get(text(row["decision"]), "")
    served = "served" if row["is_champion"] else ""
    return _mean_point(label, row, ", ".join(filter(None, (decided, served))))


def _trend_caption(metric: str, tuned: Sequence[Row]) -> str:
    better = BETTER.get(text(tuned[0]["better"]), "")
    caption = f"{metric} of the fine-tuned model without negative prompt" + (
        f"; {better}. " if better else ". "
    )
    if tuned[0]["scale"] == "ratio":
        caption += "Geometric means over prompts. "
    caption += "Dashed: the base model. "
    caption += "Only answers to the present suite and sampler are compared."
    if incomplete := sum(not row["is_complete"] for row in tuned):
        caption += f" {plural(incomplete, 'checkpoint')} did not answer all of it."
    return caption


def _trend_cells(row: Row) -> dict[str, Any]:
    """One row of a table of checkpoints, in words."""
    decision = text(row["decision"])
    return {
        "checkpoint": short(row["checkpoint_id"]),
        "trained": moment(row["trained_at"]) or text(row["kind"]),
        "variant": variant_name(text(row["variant"])),
        "mean": rounded(row["mean"]),
        "interval": interval(row, "low_95", "high_95", of="mean"),
        "prompts": count(row, "prompts"),
        "decision": DECIDED.get(decision, ""),
        "decision_css": decision if decision in DECIDED else "",
    }


def _extremes_told(published: Published) -> str:
    """What the cards of `_extremes` show, which need not be gains and losses."""
    effects = [prompt.effect for prompt in published.prompts if prompt.effect is not None]
    if not any(effect < 0 for effect in effects):
        return "Where fine-tuning gained most and gained least (no prompt lost)"
    if not any(effect > 0 for effect in effects):
        return "Where fine-tuning lost least and lost most (no prompt gained)"
    return "Where fine-tuning gained most and lost most"


def _finds(rows: Sequence[Row], by: str) -> str:
    """What the suite would find by a metric, from its rows of `paired_effects`; `by`: difference or
    ratio."""
    asked = [row for row in rows if number(row["low_95"]) is not None]
    known = [number(row["detectable_difference"]) for row in asked]
    detectable = sorted(n for n in known if n is not None)
    if not detectable:
        return ""
    least, largest = (
        change(n, by) if by == "ratio" else charts.plain(n) for n in (detectable[0], detectable[-1])
    )
    span = (
        f"{least} on" if least == largest else f"{least} to {largest} on, depending on the question"
    )
    told = (
        f"With {max(count(row, 'prompts') for row in rows)} prompts this suite finds {by}s from "
        f"{span}, four times of five, the correction counted. "
        "Smaller ones may be there unseen. "
    )
    if beyond := len(known) - len(detectable):
        told += (
            f"On {plural(beyond, 'question')} of {len(known)} none that the metric could show is "
            "large enough. "
        )
    return told


def _most_changed(published: Published) -> list[Prompt]:
    """The two prompts that gained most and the two that lost most by fine-tuning; where none gained
    or none lost, those that lost or gained least."""
    known = sorted(
        (prompt for prompt in published.prompts if prompt.effect is not None),
        key=lambda prompt: (-(prompt.effect or 0.0), prompt.prompt_id),
    )
    gained = [prompt for prompt in known if (prompt.effect or 0.0) > 0] or known
    lost = [prompt for prompt in known if (prompt.effect or 0.0) < 0] or known
    return [*gained[:2], *(prompt for prompt in lost[-2:] if prompt not in gained[:2])]


def _extremes(published: Published, pictures: Pictures) -> list[dict[str, Any]]:
    """Cards of `_most_changed`: the base model's and the tuned one's image of the first seed."""
    files = gallery_files(published)
    cards = []
    for prompt in _most_changed(published):
        seed = prompt.seeds[0]
        pair = [prompt.shots.get((seed, variant)) for variant in (BASELINE, TUNED)]
        shown = [picture_of(pictures, shot.image if shot else None) for shot in pair]
        if not all(shown):
            continue
        slug = slug_of(prompt.prompt_id)
        cards.append(
            {
                "href": f"{files[prompt.prompt_id]}#{slug}",
                "prompt_id": prompt.prompt_id,
                "prompt": cut(prompt.prompt, 140),
                "effect": prompt.effect,
                "left": shown[0],
                "left_alt": alt_text(prompt, BASELINE, seed),
                "right": shown[1],
                "right_alt": alt_text(prompt, TUNED, seed),
            }
        )
    return cards
