"""The thesis's result from scores made for the purpose, against sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core import thesis
from posterpipe.core.statistics import bootstrap_interval

LEVELS = {"sd": 0.20, "sd_negative": 0.21, "dreambooth": 0.26, "dreambooth_negative": 0.30}
PROMPTS = {"rocket": thesis.PROMPT, **{f"p{number}": f"poster {number}" for number in range(7)}}
METRIC = "clip_t.crop.tiny.12345678.v1"


@pytest.fixture
def study(tmp_path: Path) -> tuple[pd.DataFrame, pd.DataFrame, Path]:
    """Scores and generations of the four variants, eight prompts and two seeds; one is blocked."""
    rng = np.random.default_rng(4)
    rows = []
    for variant, level in LEVELS.items():
        for number, (prompt_id, prompt) in enumerate(PROMPTS.items()):
            for seed in (10 * number, 10 * number + 1):
                value = level + 0.01 * number + rng.normal(0, 0.004)
                name = f"{variant}-{seed}.png"
                Image.new("RGB", (8, 12), (seed % 256, 90, 40)).save(tmp_path / name)
                rows.append((variant, prompt_id, prompt, seed, value, "ok", name))
    table: Any = pd.DataFrame(
        rows,
        columns=["variant", "prompt_id", "prompt", "seed", "clip_cosine", "status", "image_path"],
    )
    table.loc[0, ["clip_cosine", "status"]] = [math.nan, "blocked"]
    table.loc[1, "clip_cosine"] = -0.05
    table["generation_key"] = table["image_path"]
    table["negative_prompt"] = np.where(table["variant"].str.endswith("_negative"), "busy", "")
    table["score_text"], table["settings"] = table["prompt"], "{}"
    # As the asset clip_scores lacks them.
    dropped = ["prompt", "score_text", "image_path", "negative_prompt", "settings"]
    scores = table.drop(columns=dropped).assign(metric_id=METRIC)
    return scores, table.drop(columns="clip_cosine"), tmp_path


def test_each_variant_has_its_mean_interval_and_n(
    study: tuple[pd.DataFrame, pd.DataFrame, Path],
) -> None:
    scores, generations, _ = study
    table: Any = thesis.growth(scores, generations).set_index("variant")
    assert table.index.tolist() == list(LEVELS)
    assert table["thesis"].tolist() == [0.35, 0.38, 0.61, 0.77]
    assert table["images"].tolist() == [16] * 4 and table["missing"].tolist() == [1, 0, 0, 0]
    assert table["prompts"].tolist() == [8] * 4
    sd = scores[scores["variant"] == "sd"]
    means = sd.groupby("prompt_id")["clip_cosine"].mean().to_numpy()
    assert table.loc["sd", "cosine"] == pytest.approx(means.mean())
    assert tuple(table.loc["sd", ["low", "high"]]) == pytest.approx(bootstrap_interval(means))
    assert table.loc["sd", "thesis_prompt"] == pytest.approx(-0.05), "the other one is blocked"


def test_intervals_of_two_prompts_end_where_cosines_and_scores_do(
    study: tuple[pd.DataFrame, pd.DataFrame, Path],
) -> None:
    scores, generations, _ = study
    apart = scores["prompt_id"].map({"p1": 0.9, "p2": 0.1})
    sign = np.where(scores["variant"] == "sd", 0, apart)
    two = scores.assign(clip_cosine=sign)[apart.notna()]
    table: Any = thesis.growth(two, generations).set_index("variant").loc["dreambooth"]
    assert table["prompts"] == 2
    assert (table["low"], table["high"]) == (-1, 1)
    assert (table["score_low"], table["score_high"]) == (0, 2.5)
    assert (table["gain_low"], table["gain_high"]) == (-2, 2)


def test_the_scaled_score_is_that_of_hessel_image_by_image(
    study: tuple[pd.DataFrame, pd.DataFrame, Path],
) -> None:
    scores, generations, _ = study
    table: Any = thesis.growth(scores, generations).set_index("variant")
    sd = scores[scores["variant"] == "sd"]
    by_hand = [
        np.nanmean([2.5 * max(value, 0) if value == value else math.nan for value in part])
        for _, part in sd.groupby("prompt_id")["clip_cosine"]
    ]
    assert table.loc["sd", "score"] == pytest.approx(np.mean(by_hand))
    assert table.loc["sd", "score"] > 2.5 * table.loc["sd", "cosine"], "a negative one counts as 0"
    tuned = table.loc["dreambooth"]
    assert tuned["score"] == pytest.approx(2.5 * tuned["cosine"])


def test_gains_are_paired_and_unknown_where_there_is_nothing_to_pair(
    study: tuple[pd.DataFrame, pd.DataFrame, Path],
) -> None:
    scores, generations, _ = study
    table: Any = thesis.growth(scores, generations).set_index("variant")
    wide = scores.pivot(index=["prompt_id", "seed"], columns="variant", values="clip_cosine")
    pairs = (wide["dreambooth"] - wide["sd"]).dropna().groupby("prompt_id").mean()
    assert table.loc["dreambooth", "gain"] == pytest.approx(pairs.mean())
    assert table.loc["dreambooth", "gain_low"] > 0
    assert math.isnan(table.loc["sd", "gain"])
    alone = thesis.growth(scores[scores["variant"] == "dreambooth"], generations)
    assert alone["variant"].tolist() == ["dreambooth"] and alone["gain"].isna().all()


def test_best_and_worst_follow_their_rule_and_name_each_prompt_once(
    study: tuple[pd.DataFrame, pd.DataFrame, Path],
) -> None:
    scores, _, _ = study
    shuffled = scores.sample(frac=1, random_state=3)
    best, worst = thesis.extremes(shuffled, 3)
    wide = scores.pivot(index=["prompt_id", "seed"], columns="variant", values="clip_cosine")
    differences = (wide["dreambooth_negative"] - wide["sd"]).dropna()
    assert (differences > 0).all(), "then the others are those that gained least"
    assert thesis.told_extremes("worst", worst).title == "Smallest gains, since no pair lost"
    for table, by_prompt in (
        (best, differences.groupby("prompt_id").max().sort_values(ascending=False)),
        (worst, differences.groupby("prompt_id").min().sort_values()),
    ):
        assert table["prompt_id"].tolist() == by_prompt.index[:3].tolist()
        assert table["difference"].tolist() == pytest.approx(by_prompt[:3].tolist())
    # The blocked image's pair has no difference, so its prompt is there with its other seed.
    assert (best["prompt_id"].iloc[0], best["seed"].iloc[0]) == ("rocket", 1)


@pytest.mark.parametrize("direction", [1, -1])
def test_only_what_lost_is_shown_among_the_losses_and_only_what_gained_among_the_gains(
    study: tuple[pd.DataFrame, pd.DataFrame, Path], direction: int
) -> None:
    scores, generations, root = study
    values = direction * scores["clip_cosine"]
    # Two prompts the other way round.
    few = scores["prompt_id"].isin(["p1", "p2"]) & (scores["variant"] == "dreambooth_negative")
    scores = scores.assign(clip_cosine=values.where(~few, values - direction * 0.3))
    made = thesis.report(scores, generations, evidence(scores), root)
    assert (made.best["difference"] > 0).all() and (made.worst["difference"] < 0).all()
    assert {len(made.best), len(made.worst)} == {2, thesis.SHOWN}
    assert made.captions["best"].startswith("Largest gains: ")
    assert made.captions["worst"].startswith("Largest losses: ")
    # And all one way.
    scores = scores.assign(clip_cosine=values)
    made = thesis.report(scores, generations, evidence(scores), root)
    if direction == 1:
        assert "Largest losses" not in made.captions["worst"] and "lost" in made.captions["worst"]
        assert "least above" in made.captions["worst"] and (made.worst["difference"] > 0).all()
    else:
        assert "Largest gains" not in made.captions["best"] and "gained" in made.captions["best"]
        assert "least below" in made.captions["best"] and (made.best["difference"] < 0).all()


def test_a_suite_of_one_prompt_has_means_and_says_that_it_has_no_interval(
    study: tuple[pd.DataFrame, pd.DataFrame, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    scores, generations, root = study
    own = scores["prompt_id"] == "p1"
    one = scores[own].groupby("variant", as_index=False, sort=False).head(1)
    drawn: list[int] = []
    labels: list[str] = []
    errorbar, set_xticks = Axes.errorbar, Axes.set_xticks

    def spy_bars(self: Axes, x: Any, y: Any, yerr: Any, **kwargs: Any) -> Any:
        drawn.append(len(x))
        assert np.isfinite(yerr).all()
        return errorbar(self, x, y, yerr=yerr, **kwargs)

    def spy_labels(self: Axes, ticks: Any, names: Any = None, **kwargs: Any) -> Any:
        labels.extend(names or [])
        return set_xticks(self, ticks, names, **kwargs)

    monkeypatch.setattr(Axes, "errorbar", spy_bars)
    monkeypatch.setattr(Axes, "set_xticks", spy_labels)
    made = thesis.report(one, generations[generations["prompt_id"] == "p1"], evidence(one), root)
    assert drawn == [0], "no whiskers"
    assert len(labels) == 4
    for label in labels:
        assert "1 prompt\n1 image\n(no interval)" in label
    assert "nan" not in made.captions["growth"]
    assert "Stable Diffusion: 0.5" in made.captions["growth"]
    assert made.captions["growth"].count("(no interval)") >= 4


def evidence(scores: pd.DataFrame) -> pd.DataFrame:
    """Of the columns of the evidence those that the chart reads; a champion's images beside it."""
    rng = np.random.default_rng(6)
    parts = []
    for role, gain in {"control": 0.08, "specific": -0.02, "rank": -0.1, "clip": 0.06}.items():
        tuned = scores["variant"].str.startswith("dreambooth")
        values = 0.1 + gain * tuned + rng.normal(0, 0.004, len(scores))
        own = scores[["generation_key", "variant", "prompt_id", "seed"]]
        parts.append(own.assign(role=role, metric_id=f"{role}.v1", value=values))
        champion = own[tuned].assign(generation_key="champion's " + own["generation_key"])
        parts.append(champion.assign(role=role, metric_id=f"{role}.v1", value=0.9))
    return pd.concat(parts, ignore_index=True)


def test_the_negative_control_is_told_with_the_chart(
    study: tuple[pd.DataFrame, pd.DataFrame, Path], tmp_path: Path
) -> None:
    scores, generations, root = study
    measured = evidence(scores)
    made = thesis.report(scores, generations, measured, root)
    made.write(tmp_path / "public")
    control = pd.read_csv(tmp_path / "public" / "control.csv")
    assert control["role"].unique().tolist() == ["control", "specific", "rank"]
    tuned = control[control["contrast"] == "tuned without negative"].set_index("role")
    for role, gain in {"control": 0.08, "specific": -0.02, "rank": -0.1}.items():
        assert tuned["low"][role] < tuned["estimate"][role] < tuned["high"][role]
        assert tuned["estimate"][role] == pytest.approx(gain, abs=0.006)
        # Image by image, and the champion's images are others.
        own = measured[(measured["role"] == role) & ~measured["generation_key"].str.contains("'")]
        means = own.groupby("variant")["value"].mean()
        assert tuned["estimate"][role] == pytest.approx(means["dreambooth"] - means["sd"])
    said = made.captions["growth"]
    for name in ("control", "specific"):
        row = tuned.loc[name]
        assert f"{row['estimate']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})" in said
    told = json.loads((tmp_path / "public" / "growth.json").read_text("utf-8"))
    assert len(told["control"]) == len(control)
    # A suite of one text has none, and the chart says nothing about it.
    alone = thesis.report(scores, generations, measured.iloc[:0], root)
    assert alone.control.empty and "other prompts" not in alone.captions["growth"]
    assert alone.pictures["growth"].tobytes() != made.pictures["growth"].tobytes()


def test_a_mean_without_an_interval_says_so(
    study: tuple[pd.DataFrame, pd.DataFrame, Path],
) -> None:
    scores, generations, root = study
    alike = scores.assign(clip_cosine=0.2)
    made = thesis.report(alike, generations, evidence(scores), root)
    assert made.table[["low", "high", "score_low", "score_high"]].isna().all(axis=None)
    assert "Stable Diffusion: 0.50 (no interval)" in made.captions["growth"]
    assert "nan" not in made.captions["growth"]


def test_the_study_is_on_no_axis_of_raw_cosines(
    study: tuple[pd.DataFrame, pd.DataFrame, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scale is not stated: beside one its 0.77 would read as a cosine of 0.31."""
    from matplotlib.figure import Figure

    scores, generations, _ = study
    drawn: list[Figure] = []
    draw = Figure.draw

    def kept(figure: Figure, renderer: Any) -> None:
        drawn.append(figure)
        draw(figure, renderer)

    monkeypatch.setattr(Figure, "draw", kept)
    thesis.draw_growth(thesis.growth(scores, generations), METRIC)
    (axes,) = drawn[-1].axes
    assert axes.get_ylabel() == "CLIPScore, 2.5 · max(cosine, 0)" and not axes.child_axes


@pytest.mark.parametrize("variants", [["sd"], list(LEVELS)])
def test_variants_of_which_every_image_is_blocked_have_no_bar_and_break_nothing(
    study: tuple[pd.DataFrame, pd.DataFrame, Path], variants: list[str], tmp_path: Path
) -> None:
    scores, generations, root = study
    gone = scores["variant"].isin(variants)
    scores = scores.assign(
        clip_cosine=scores["clip_cosine"].mask(gone), status=scores["status"].mask(gone, "blocked")
    )
    measured = evidence(scores)
    measured["value"] = measured["value"].mask(measured["variant"].isin(variants))
    made = thesis.report(scores, generations, measured, root)
    made.write(tmp_path / "public")
    table = made.table.set_index("variant")
    assert table["score"].isna().tolist() == [name in variants for name in LEVELS]
    assert table["gain"].isna().all()
    assert made.captions["growth"].startswith("Stable Diffusion: no score")
    assert made.captions["best"].startswith("Nothing to compare: ")
    assert not any("nan" in caption for caption in made.captions.values())


def test_gains_and_extremes_leave_out_prompts_without_a_negative_prompt(
    study: tuple[pd.DataFrame, pd.DataFrame, Path],
) -> None:
    scores, generations, root = study
    some = generations["prompt_id"].isin(["p5", "p6"])
    mixed = generations.assign(negative_prompt=generations["negative_prompt"].mask(some, ""))
    before = thesis.report(scores, generations, evidence(scores), root)
    made = thesis.report(scores, mixed, evidence(scores), root)
    table: Any = made.table.set_index("variant")
    effects: Any = made.effects.set_index("contrast")
    for variant, contrast in {
        "sd_negative": "negative on base",
        "dreambooth": "tuned without negative",
        "dreambooth_negative": "both",
    }.items():
        gain = table.loc[variant, ["gain", "gain_low", "gain_high"]].tolist()
        assert gain == effects.loc[contrast, ["estimate", "low", "high"]].tolist()
    assert effects["prompts"]["both"] == 6
    unchanged = ["prompts", "cosine", "low", "high", "score"]
    pd.testing.assert_frame_equal(made.table[unchanged], before.table[unchanged])
    for pairs in (made.best, made.worst):
        assert not set(pairs["prompt_id"]) & {"p5", "p6"}
    assert set(before.best["prompt_id"]) | set(before.worst["prompt_id"]) > {"p6"}


@pytest.mark.parametrize(
    ("column", "variants", "now"),
    [
        ("prompt", ["sd", "sd_negative"], "another poster"),
        ("negative_prompt", ["dreambooth_negative"], "crowded"),
        ("settings", ["dreambooth", "dreambooth_negative"], '{"guidance_scale": 9}'),
    ],
)
def test_nothing_is_compared_that_the_two_models_were_not_asked_alike(
    study: tuple[pd.DataFrame, pd.DataFrame, Path], column: str, variants: list[str], now: str
) -> None:
    scores, generations, root = study
    asked = generations["prompt_id"].isin(["p5", "p6"]) & generations["variant"].isin(variants)
    mixed = generations.assign(**{column: generations[column].mask(asked, now)})
    made = thesis.report(scores, mixed, evidence(scores), root)
    for table in (made.effects, made.control[made.control["role"] == "specific"]):
        prompts = table.set_index("contrast")["prompts"]
        assert prompts["tuned"] == prompts["both"] == prompts["interaction"] == 6
        assert prompts["negative on base"] == 8, "asked of one model"
    gains = made.table.set_index("variant")["gain"]
    effects = made.effects.set_index("contrast")["estimate"]
    assert gains["dreambooth_negative"] == pytest.approx(effects["both"])
    assert made.table["prompts"].tolist() == [8] * 4
    for pairs in (made.best, made.worst):
        assert list(pairs.columns) == ["prompt_id", "seed", "difference"]
        assert not set(pairs["prompt_id"]) & {"p5", "p6"}


def test_effects_leave_out_prompts_without_a_negative_prompt(
    study: tuple[pd.DataFrame, pd.DataFrame, Path],
) -> None:
    scores, generations, root = study
    some = generations["prompt_id"].isin(sorted(generations["prompt_id"].unique())[:3])
    mixed = generations.assign(negative_prompt=generations["negative_prompt"].mask(some, ""))
    made = thesis.report(scores, mixed, evidence(scores), root)
    for table in (made.effects, made.control[made.control["role"] == "specific"]):
        prompts = table.set_index("contrast")["prompts"]
        assert prompts["tuned without negative"] == 8 and prompts["negative on base"] == 5
    control = made.control.set_index("role")["win_rate"]
    assert control["control"].isna().all(), "a higher control is no merit"
    assert control["specific"].notna().all()


def test_the_report_writes_pictures_table_and_explanation(
    study: tuple[pd.DataFrame, pd.DataFrame, Path], tmp_path: Path
) -> None:
    scores, generations, root = study
    measured = evidence(scores)
    made = thesis.report(scores, generations, measured, root)
    made.write(tmp_path / "public")
    for name in ("growth", "best", "worst"):
        with Image.open(tmp_path / "public" / f"{name}.png") as picture:
            assert min(picture.size) > 300, name
    told = json.loads((tmp_path / "public" / "growth.json").read_text("utf-8"))
    assert told["metric_id"] == METRIC and "2.5 * max(cosine, 0)" in told["scales"]
    assert [row["thesis"] for row in told["variants"]] == [0.35, 0.38, 0.61, 0.77]
    assert told["variants"][0]["gain"] is None
    assert told["best"]["pairs"][0]["prompt_id"] == "rocket"
    assert "most above" in told["best"]["rule"] and "least above" in told["worst"]["rule"]
    frame = pd.read_csv(tmp_path / "public" / "growth.csv")
    pd.testing.assert_frame_equal(frame, made.table)
    effects = pd.read_csv(tmp_path / "public" / "effects.csv").set_index("contrast")
    gains = made.table.set_index("variant")["gain"]
    assert effects["estimate"]["tuned without negative"] == pytest.approx(gains["dreambooth"])
    assert effects["estimate"]["both"] == pytest.approx(gains["dreambooth_negative"])
    assert (effects["low"] <= effects["estimate"]).all()
    assert len(told["effects"]) == len(effects)
    # Without the other metrics, nobody here knows how many questions are asked.
    assert not {"p_value", "detectable", "finding"} & set(effects.columns)
    assert thesis.report(scores, generations, measured, root).digest == made.digest
    other = scores.assign(clip_cosine=scores["clip_cosine"] + 0.01)
    assert thesis.report(other, generations, measured, root).digest != made.digest
