"""The thesis's result, live: its growth chart and table from the scores that there are now.

What belongs here: what the thesis reported, the same four variants as they score here, the chart,
and which images are shown as best and worst. What does not: scoring (`metrics`), estimating
(`statistics`) and arranging pictures (`gallery`).

The thesis showed one image a variant. Here each number is a mean over prompts with its interval,
and what is shown is chosen by a rule that is printed beside it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image

from posterpipe.core.files import write_atomic
from posterpipe.core.gallery import Picture, grid
from posterpipe.core.statistics import (
    QUESTION,
    Effect,
    answers,
    effects,
    mean_interval,
    paired_difference,
)
from posterpipe.core.variants import DELAYED_VARIANTS, is_tuned

VARIANTS: Mapping[str, tuple[str, float]] = {
    "sd": ("Stable Diffusion", 0.35),
    "sd_negative": ("+ negative prompt", 0.38),
    "dreambooth": ("fine-tuned with DreamBooth", 0.61),
    "dreambooth_negative": ("fine-tuned + negative prompt", 0.77),
}
"""What the thesis calls its variants, and the CLIP score that it reports of each."""

PROMPT = "animated movie poster 'rocket' only one spaceship is prominently displayed in the center"
"""The one prompt of the thesis."""

SCALE = 2.5
"""w of Hessel et al. (2021, arXiv:2104.08718): CLIPScore = w * max(cosine, 0)."""

CONTROLS = ("control", "specific", "rank")
"""Roles of the evidence that tell whether a score is the own prompt's."""

_BETTER = {"control": "neither"}
"""Of these roles higher values are no merit."""

SHOWN = 4
"""Best and worst pairs that are shown at most."""

NO_INTERVAL = "no interval"
"""In place of the interval of a mean over one prompt, which does not tell how far another prompt
would be from it."""

SCALES = (
    "A cosine of image and text lies between -1 and 1; real CLIP models rarely give more than 0.4. "
    "The CLIPScore of Hessel et al. (2021) is 2.5 * max(cosine, 0), and is what papers often call "
    "the CLIP score. The thesis does not say which of the two it reports. Its 0.61 and 0.77 cannot "
    "be cosines of a real CLIP; as CLIPScores they are cosines of 0.24 and 0.31. Its 0.35 and 0.38 "
    "would be ordinary cosines, and low ones (0.14 and 0.15) as CLIPScores. So its levels cannot "
    "be compared with those here, and neither can those of two encoders: what can be compared is "
    "the order of the variants, and whether their differences are larger than chance."
)
"""What a reader has to know before comparing the numbers."""


def _rows(table: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples."""
    return iter(table.itertuples(index=False))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _ends(low: float, high: float, form: str) -> str:
    """An interval in words, also where there is none."""
    known = math.isfinite(low) and math.isfinite(high)
    return f"{low:{form}} to {high:{form}}" if known else NO_INTERVAL


def growth(scores: pd.DataFrame, generations: pd.DataFrame) -> pd.DataFrame:
    """One row a variant of the thesis that `scores` has, in the thesis's order.

    `scores` has variant, prompt_id, seed, negative_prompt, question (`questions`), clip_cosine (NaN
    without a score), of one metric; `generations` the variant, prompt_id, seed and prompt of each
    image. Columns: variant, label, thesis (its score), images, missing (without a score), prompts,
    cosine with low and high, score (2.5 * max(cosine, 0), the mean over images) with score_low (0
    or more) and score_high, gain (cosine less that of sd, see `statistics.paired_difference`) with
    gain_low and gain_high, and thesis_prompt (mean cosine of the images of the thesis's own prompt;
    NaN where the suite lacks it). Intervals of few prompts end where the values do.
    """
    scaled = scores.assign(score=SCALE * scores["clip_cosine"].clip(lower=0))
    own = generations.loc[generations["prompt"] == PROMPT, "prompt_id"].unique()
    rows = []
    for variant, (label, reported) in VARIANTS.items():
        part = scaled[scaled["variant"] == variant]
        if part.empty:
            continue
        cosine, score = mean_interval(part), mean_interval(part, "score")
        row = {
            "variant": variant, "label": label, "thesis": reported, "images": len(part),
            "missing": len(part) - cosine.images, "prompts": cosine.prompts,
            "cosine": cosine.mean, "low": max(cosine.low, -1.0), "high": min(cosine.high, 1.0),
            "score": score.mean, "score_low": max(score.low, 0.0),
            "score_high": min(score.high, SCALE),
            "gain": math.nan, "gain_low": math.nan, "gain_high": math.nan,
            "thesis_prompt": part.loc[part["prompt_id"].isin(own), "clip_cosine"].mean(),
        }  # fmt: skip
        if variant != "sd" and (scaled["variant"] == "sd").any():
            gain = paired_difference(scaled, variant, "sd")
            low, high = max(gain.low, -2.0), min(gain.high, 2.0)
            row |= {"gain": gain.mean, "gain_low": low, "gain_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def questions(generations: pd.DataFrame) -> pd.Series:
    """What was requested of each image's model with its prompt and seed, all variants together.

    `generations` as of `generations.COLUMNS`. Where the suite or the sampler changed and only one
    model has drawn anew, the two answer different requests, and are not compared.
    """
    texts = generations[["prompt", "score_text", "negative_prompt", "settings"]].astype(str)
    rows = pd.Series([json.dumps(row) for row in texts.to_numpy().tolist()], generations.index)
    # A late negative prompt is compared with that of its own model only.
    rows = rows.mask(generations["variant"].isin(DELAYED_VARIANTS))
    model = is_tuned(generations["variant"])
    cells = rows.groupby([model, generations["prompt_id"], generations["seed"]])
    return cells.transform(lambda asked: "\n".join(sorted(set(asked.dropna()))))


def _asked(generations: pd.DataFrame) -> pd.DataFrame:
    """What estimates have to know of each generation_key."""
    told = generations[["generation_key", "negative_prompt"]]
    return told.assign(**{QUESTION: questions(generations)})


def control_effects(evidence: pd.DataFrame, generations: pd.DataFrame) -> pd.DataFrame:
    """The effects on CLIP-T with the other prompts of the suite, and on what is the own one's.

    `evidence` as of `evidence.EVIDENCE_COLUMNS`; of it, the rows of `generations` with the roles
    specific, control and rank. Columns: role, metric_id, then the fields of `statistics.Effect`; no
    rows where the suite has one text.
    """
    own = evidence.merge(_asked(generations), on="generation_key")
    parts = []
    for role in CONTROLS:
        rows = own[own["role"] == role]
        if len(rows):
            found = effects(rows, value="value", better=_BETTER.get(role, "higher"))
            found.insert(0, "role", role)
            found.insert(1, "metric_id", str(rows["metric_id"].iloc[0]))
            parts.append(found)
    names = ["role", "metric_id", *Effect.__dataclass_fields__]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=names)


def control_told(own: pd.DataFrame, control: pd.DataFrame) -> str:
    """What fine-tuning changed, without negative prompt, with the own prompts and with the others.

    `own` as of `statistics.effects`, `control` as of `control_effects`; "" where one has no row, or
    no pair of images with a score.
    """
    contrast = "tuned without negative"
    rows = {"own": own[own["contrast"] == contrast]}
    for role in CONTROLS:
        rows[role] = control[(control["contrast"] == contrast) & (control["role"] == role)]
    if any(len(found) == 0 or found["estimate"].isna().any() for found in rows.values()):
        return ""
    said = {
        name: f"{row.estimate:+.3f} ({_ends(row.low, row.high, '+.3f')})"
        for name, found in rows.items()
        for row in _rows(found)
    }
    return (
        f"Fine-tuning without negative prompt changes the cosine with the own prompt by "
        f"{said['own']},\nwith the other prompts of the suite by {said['control']}; "
        f"own less others: {said['specific']}"
    )


def draw_growth(table: pd.DataFrame, metric_id: str, note: str = "") -> Image.Image:
    """The thesis's chart with intervals: a bar a variant, n below, the thesis's numbers beside.

    The axis is 2.5 * max(cosine, 0). There is none of raw cosines beside it: the thesis's numbers
    are on a scale that is not stated, and would be read on it. `note` stands below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.0), dpi=120, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = np.arange(len(table))
    tuned = is_tuned(table["variant"])
    colours = ["#c8793a" if own else "#8fa6c4" for own in tuned]
    axes.bar(places, table["score"], 0.56, color=colours, zorder=2)
    below, above = table["score"] - table["score_low"], table["score_high"] - table["score"]
    sure = (below.notna() & above.notna()).to_numpy()
    axes.errorbar(
        places[sure], table["score"][sure], yerr=np.array([below[sure], above[sure]]), fmt="none",
        ecolor="#26262a", elinewidth=1.6, capsize=6, zorder=3,
    )  # fmt: skip
    axes.plot(
        places + 0.36, table["thesis"], "D", ms=7, mfc="white", mec="#26262a", mew=1.4, ls="",
        label="the thesis's number (one image, scale not stated)", zorder=4, clip_on=False,
    )  # fmt: skip
    for place, row in zip(places, _rows(table), strict=True):
        if math.isnan(row.score):
            continue
        top = row.score if math.isnan(row.score_high) else row.score_high
        axes.annotate(
            f"{row.score:.2f}", (place, top), xytext=(0, 5), textcoords="offset points",
            ha="center", fontsize=11, fontweight="bold",
        )  # fmt: skip
    labels = [
        f"{row.label.replace(' + ', chr(10) + '+ ').replace(' with ', chr(10) + 'with ')}\n"
        f"{_count(row.prompts, 'prompt')}\n{_count(row.images, 'image')}"
        + ("" if known else f"\n({NO_INTERVAL})")
        + (f"\n({row.missing} without a score)" if row.missing else "")
        for row, known in zip(_rows(table), sure, strict=True)
    ]
    axes.set_xticks(places, labels, fontsize=9)
    # Not max(), which keeps a NaN that comes first.
    highest = np.nanmax([*table["score_high"], *table["score"], *table["thesis"], 0.1])
    axes.set_ylim(0, highest * 1.18)
    axes.set_xlim(-0.6, len(table) - 0.3)
    axes.set_ylabel("CLIPScore, 2.5 · max(cosine, 0)")
    axes.grid(axis="y", alpha=0.25, zorder=0)
    axes.spines["top"].set_visible(False)
    axes.set_title(
        "CLIP score of images with their prompts: mean"
        + (" and 95 % interval over prompts" if sure.any() else " (an interval takes two prompts)")
        + "\n",
        fontsize=12,
    )
    axes.text(
        0.5, 1.015, metric_id, transform=axes.transAxes, ha="center", fontsize=8, color="#6a6a70"
    )
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    if note:
        figure.supxlabel(note, fontsize=9, color="#26262a")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return Image.open(buffer).convert("RGB")


def extremes(scores: pd.DataFrame, shown: int = SHOWN) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pairs that gained most and those that lost most: prompt_id, seed, difference.

    Where none gained, the first are those that lost least; where none lost, the second are those
    that gained least. A pair is the last variant of the thesis and `sd` with the same prompt and
    seed, of models that were asked the same; prompts without a negative prompt have none
    (`statistics.answers`). Each prompt is there once, with its most extreme seed, so that one
    prompt cannot fill the table. Ties go by prompt and seed. `scores` as of `growth`.
    """
    compared = answers(scores)
    cells = [name for name in ("prompt_id", "seed", QUESTION) if name in compared]
    by_variant = {
        name: compared[compared["variant"] == name].set_index(cells)["clip_cosine"].astype(float)
        for name in ("sd", "dreambooth_negative")
    }
    difference = (by_variant["dreambooth_negative"] - by_variant["sd"]).dropna()
    pairs = difference.rename("difference").reset_index().sort_values(cells, kind="stable")
    gained, lost = pairs[pairs["difference"] > 0], pairs[pairs["difference"] < 0]
    best = (gained if len(gained) else pairs).sort_values(
        "difference", ascending=False, kind="stable"
    )
    worst = (lost if len(lost) else pairs).sort_values("difference", kind="stable")
    columns = ["prompt_id", "seed", "difference"]
    return tuple(  # type: ignore[return-value]
        part.drop_duplicates("prompt_id").head(shown)[columns].reset_index(drop=True)
        for part in (best, worst)
    )


@dataclass(frozen=True)
class Extremes:
    """What one table of `extremes` shows, in words."""

    title: str
    rule: str
    """By which its pairs were chosen."""

    def __str__(self) -> str:
        return f"{self.title}: {self.rule}"


def told_extremes(which: Literal["best", "worst"], pairs: pd.DataFrame) -> Extremes:
    """The words for a table of `extremes`."""
    if pairs.empty:
        return Extremes(
            "Nothing to compare",
            "no prompt has a seed with a score of both the fine-tuned image with negative prompt "
            "and the base model's without it",
        )
    if which == "best" and (pairs["difference"] > 0).any():
        title, how = "Largest gains", "most above"
    elif which == "best":
        title, how = "Smallest losses, since no pair gained", "least below"
    elif (pairs["difference"] < 0).any():
        title, how = "Largest losses", "most below"
    else:
        title, how = "Smallest gains, since no pair lost", "least above"
    return Extremes(
        title,
        f"the {SHOWN} prompts, or fewer where there are no more, with a seed whose fine-tuned "
        f"image with negative prompt scores {how} the base model's without it, shown with that "
        "seed. Below each image its cosine",
    )


def comparison(
    pairs: pd.DataFrame,
    scores: pd.DataFrame,
    generations: pd.DataFrame,
    store_root: Path,
    *,
    title: str,
    subtitle: str,
) -> Image.Image:
    """A grid of some (prompt, seed): a row each, a column a variant, the same noise in a row.

    Below each image stands its cosine, or the status of an image without one.
    """
    variants = [name for name in VARIANTS if (generations["variant"] == name).any()]
    values = scores.set_index(["variant", "prompt_id", "seed"])["clip_cosine"]
    drawn: Any = generations.drop_duplicates(["variant", "prompt_id", "seed"]).set_index(
        ["variant", "prompt_id", "seed"]
    )
    rows: list[str] = []
    cells: dict[tuple[str, str], Picture] = {}
    notes: dict[tuple[str, str], str] = {}
    for pair in _rows(pairs):
        heading = ""
        for variant in variants:
            place = (variant, pair.prompt_id, pair.seed)
            if place not in drawn.index:
                continue
            image = drawn.loc[place]
            heading = heading or (
                f"{image['prompt']} · seed {pair.seed} · difference {pair.difference:+.3f}"
            )
            value = float(values.get(place, math.nan))
            notes[(heading, variant)] = (
                str(image["status"]) if math.isnan(value) else f"{value:.3f}"
            )
            if image["image_path"]:
                cells[(heading, variant)] = store_root / str(image["image_path"])
        rows.append(heading)
    return grid(rows, variants, cells, cell=(150, 225), title=title, subtitle=subtitle, notes=notes)


@dataclass(frozen=True)
class Report:
    """The thesis's result as it is now."""

    metric_id: str
    table: pd.DataFrame
    """See `growth`."""
    effects: pd.DataFrame
    """See `statistics.effects`: the 2 x 2 design, with bootstrap intervals."""
    control: pd.DataFrame
    """See `control_effects`: the same with the texts of the other prompts."""
    best: pd.DataFrame
    worst: pd.DataFrame
    """See `extremes`."""
    pictures: Mapping[str, Image.Image]
    """growth, best, worst."""
    captions: Mapping[str, str]
    """What each picture shows, in words."""

    @property
    def digest(self) -> str:
        """sha256 of all that is written."""
        whole = hashlib.sha256(self._json().encode())
        for name in sorted(self.pictures):
            whole.update(self.pictures[name].tobytes())
        return whole.hexdigest()

    def write(self, folder: Path) -> None:
        """growth.png, best.png, worst.png, growth.csv, effects.csv, control.csv, and growth.json
        last."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in self.pictures.items():
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            write_atomic(folder / f"{name}.png", buffer.getvalue())
        write_atomic(folder / "growth.csv", self.table.to_csv(index=False).encode())
        write_atomic(folder / "effects.csv", self.effects.to_csv(index=False).encode())
        write_atomic(folder / "control.csv", self.control.to_csv(index=False).encode())
        write_atomic(folder / "growth.json", self._json().encode())

    def _json(self) -> str:
        """Everything that the pictures show, for other reports: numbers, rules, the two scales."""
        values: dict[str, Any] = {
            "metric_id": self.metric_id,
            "scales": SCALES,
            "prompt_of_the_thesis": PROMPT,
            "variants": json.loads(self.table.to_json(orient="records", double_precision=10)),
            "effects": json.loads(self.effects.to_json(orient="records", double_precision=10)),
            "control": json.loads(self.control.to_json(orient="records", double_precision=10)),
            **{
                name: {**asdict(told), "pairs": pairs.to_dict("records")}
                for name, pairs, told in (
                    ("best", self.best, told_extremes("best", self.best)),
                    ("worst", self.worst, told_extremes("worst", self.worst)),
                )
            },
            "captions": dict(self.captions),
        }
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def report(
    scores: pd.DataFrame, generations: pd.DataFrame, evidence: pd.DataFrame, store_root: Path
) -> Report:
    """The thesis's result from the table of CLIP scores (one metric), the images behind it, and the
    evidence about them (`evidence.EVIDENCE_COLUMNS`)."""
    metric_id = str(scores["metric_id"].iloc[0])
    scores = scores.merge(_asked(generations), on="generation_key")
    table = growth(scores, generations)
    best, worst = extremes(scores)
    own, control = effects(scores), control_effects(evidence, generations)
    note = control_told(own, control)
    means = "; ".join(
        f"{row.label}: {row.score:.2f} ({_ends(row.score_low, row.score_high, '.2f')})"
        if math.isfinite(row.score)
        else f"{row.label}: no score"
        for row in _rows(table)
    )
    captions = {"growth": f"{means}. {' '.join(note.split())}" if note else means}
    pictures = {"growth": draw_growth(table, metric_id, note)}
    for name, pairs, told in (
        ("best", best, told_extremes("best", best)),
        ("worst", worst, told_extremes("worst", worst)),
    ):
        captions[name] = str(told)
        pictures[name] = comparison(
            pairs, scores, generations, store_root, title=told.title, subtitle=told.rule
        )
    return Report(metric_id, table, own, control, best, worst, pictures, captions)
