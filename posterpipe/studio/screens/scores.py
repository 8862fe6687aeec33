"""Scores: the leaderboard and the gallery of the published database.

What belongs here: the page. What does not: reading the publication (`studio.published`).
"""

import datetime as dt
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import streamlit as st
from streamlit.elements.lib.column_types import ColumnConfig

from posterpipe.core.files import Signature
from posterpipe.core.variants import LABELS
from posterpipe.studio import look
from posterpipe.studio.published import PublishedError
from posterpipe.studio.rooms import is_served, rooms

LOOK_SECONDS = 1.0
"""How often the page asks whether there is a new publication."""

COLUMNS = {
    "variant": "Variant",
    "mean": "Mean",
    "low_95": "95 % from",
    "high_95": "to",
    "diff_to_sd": "Against base",
    "diff_low_95": "95 % from ",
    "diff_high_95": "to ",
    "prompts": "Prompts",
    "images": "Images",
    "blocked": "Blocked",
    "checkpoint_id": "Model",
}


RATIO_COLUMNS = {**COLUMNS, "mean": "Geometric mean", "diff_to_sd": "Ratio to base"}
"""Of metrics that are compared by ratio."""


def watch(shown: Signature | None) -> None:
    """Waits for a publication that the page does not show, and runs the page again.

    To be called last. Whatever is clicked meanwhile ends it.
    """
    spot = st.empty()
    while is_served():
        time.sleep(LOOK_SECONDS)
        spot.empty()  # where a page that was left ends
        if rooms().published.signature() != shown:
            st.rerun()


@st.cache_data(show_spinner=False, max_entries=8)
def leaderboard(signature: Signature | None) -> pd.DataFrame | None:
    """As of that publication."""
    return rooms().published.leaderboard()


@st.cache_data(show_spinner=False, max_entries=8)
def questions(signature: Signature | None) -> pd.DataFrame:
    """As of that publication."""
    return rooms().published.prompts()


@st.cache_data(show_spinner=False, max_entries=64)
def images(signature: Signature | None, prompt_id: str, metric_id: str) -> pd.DataFrame:
    """As of that publication."""
    return rooms().published.images(prompt_id, metric_id)


def ago(moment: dt.datetime) -> str:
    """How long ago, in words."""
    minutes = max(0, int((dt.datetime.now(dt.UTC) - moment).total_seconds() // 60))
    if minutes < 2:
        return "just now"
    if minutes < 120:
        return f"{minutes} minutes ago"
    hours = minutes // 60
    return f"{hours} hours ago" if hours < 48 else f"{hours // 24} days ago"


def metrics_of(table: pd.DataFrame | None) -> dict[str, str]:
    """Names by metric_id, in the order of the leaderboard, which has the headline first; without
    one, those of clip_scores."""
    if table is None or "metric_id" not in table:
        return {name: name for name in rooms().published.clip_metrics()}
    names = table["metric"] if "metric" in table else table["metric_id"]
    found = dict(zip(table["metric_id"].astype(str), names.astype(str), strict=True))
    alike = Counter(found.values())
    # Two encoders, say, under one name: the id tells them apart.
    return {key: f"{name} ({key})" if alike[name] > 1 else name for key, name in found.items()}


def show_leaderboard(table: pd.DataFrame | None, metric: str) -> None:
    """The report, one metric of it."""
    if table is None or table.empty:
        look.note("The report `leaderboard` was not published: materialize it.", "no-leaderboard")
        return
    if "metric_id" in table:
        table = table[table["metric_id"] == metric]
    by_ratio = "scale" in table and table["scale"].eq("ratio").any()
    labels = RATIO_COLUMNS if by_ratio else COLUMNS
    table = table[[name for name in labels if name in table]].copy()
    if by_ratio:  # the report tells ratios less 1
        table[["diff_to_sd", "diff_low_95", "diff_high_95"]] += 1
    table["variant"] = table["variant"].map(lambda name: LABELS.get(name, name))
    if "checkpoint_id" in table:
        table["checkpoint_id"] = table["checkpoint_id"].str[:8]
    columns: dict[str, ColumnConfig] = {}
    for name, label in labels.items():
        if name in table and table[name].dtype.kind == "f":
            columns[name] = st.column_config.NumberColumn(label, format="%.3f")
        elif name in table:
            columns[name] = st.column_config.Column(label)
    st.dataframe(
        table, hide_index=True, width="stretch", column_config=columns, placeholder="\u2013"
    )


def show_gallery(signature: Signature | None, metric: str) -> None:
    """The images of a prompt: a row a seed, a column a variant."""
    prompts = questions(signature)
    if prompts.empty:
        return
    names = list(prompts["prompt_id"])
    if st.session_state.get("scores.prompt") not in names:
        st.session_state["scores.prompt"] = names[0]
    chosen = st.selectbox("Prompt", names, key="scores.prompt")
    texts = dict(zip(prompts["prompt_id"], prompts["prompt"], strict=True))
    look.faint(texts[chosen], "prompt")
    found = images(signature, chosen, metric)
    variants = [name for name in LABELS if name in set(found["variant"])]
    with st.container(key="pair-gallery"):
        for seed, row in found.groupby("seed", sort=True):
            cells = {str(cell.variant): cell for cell in row.itertuples(index=False)}
            for column, variant in zip(st.columns(len(variants)), variants, strict=True):
                with column, st.container(key=f"poster-{seed}-{variant}"):
                    show_cell(cells.get(variant), variant, int(str(seed)))


def show_cell(cell: object, variant: str, seed: int) -> None:
    """One image with its score."""
    key = f"{seed}-{variant}"
    status = str(getattr(cell, "status", "missing"))
    path = rooms().store / Path(str(getattr(cell, "image_path", "") or "nowhere"))
    if status == "missing" or not path.is_file():
        look.faint(f"{LABELS[variant]}: no picture", f"gone-{key}")
        return
    data = path.read_bytes()
    st.image(data, alt=f"{LABELS[variant]}, seed {seed}", width="stretch")
    value = getattr(cell, "clip_cosine", None)
    score = status if value is None or pd.isna(value) else f"{value:.3f}"
    look.faint(f"{LABELS[variant]}\n{score} · seed {seed}", f"score-{key}")


def main() -> None:
    """The page."""
    st.title("Scores", anchor=False)
    signature = rooms().published.signature()
    show(signature)
    watch(signature)


def show(signature: Signature | None) -> None:
    """A publication."""
    published = rooms().published
    moment = published.published_at()
    if signature is None or moment is None:
        look.empty(
            "No scores yet",
            "They appear here when the pipeline has published them: press Materialize all in the "
            "Dagster UI, or run posterpipe demo.",
            "no-scores",
        )
        return
    try:
        board = leaderboard(signature)
        metrics = metrics_of(board)
        look.faint(f"Published {ago(moment)}.", "published")
        if not metrics:
            look.empty("No scores yet", "The published database holds none.", "no-metrics")
            return
        if st.session_state.get("scores.metric") not in metrics:
            st.session_state["scores.metric"] = next(iter(metrics))
        metric = st.session_state["scores.metric"]
        if len(metrics) > 1:
            metric = st.selectbox(
                "Metric", list(metrics), key="scores.metric", format_func=lambda key: metrics[key]
            )
        if metric.startswith("clip_t."):
            look.faint(
                "The cosine of a poster and its description: higher fits better. The interval "
                "says how sure the mean is.",
                "cosine",
            )
        show_leaderboard(board, metric)
        st.header("Gallery", anchor=False)
        show_gallery(signature, metric)
    except PublishedError as error:
        sentence = str(error)
        look.note(f"{sentence}.", "unreadable")


main()
