"""Everything that one score goes back to: `posterpipe trace`.

What belongs here: reading the warehouse's history and the store's records for one image, and
showing them as a tree. What does not: writing the store's records (`provenance`) and the history
(`history`).

Scores stay when `posterpipe gc` removes the files behind them, and so does their history: prompts,
settings, runs and environments in the warehouse, the posters of every training set that was trained
on in the store's `lineages`.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import duckdb
from rich.text import Text
from rich.tree import Tree

from posterpipe.core.generations import GENERATION
from posterpipe.core.provenance.checkpoints import CHECKPOINT
from posterpipe.core.provenance.environments import ENVIRONMENT
from posterpipe.core.provenance.lineages import lineage, training_steps
from posterpipe.core.store import Store
from posterpipe.core.warehouse.database import Warehouse, WarehouseBusy, WarehouseMissing
from posterpipe.core.warehouse.history import moment

SHOWN_POSTERS = 10

TREE_WIDTH = 1_000_000
"""Of the console that prints the tree, in characters. A line longer than the terminal is the
terminal's to wrap: rich would cut it off, or break paths and ids that people copy."""

_CANDIDATES = 5
_UNKNOWN = "not recorded"


class NotTraceable(Exception):
    """The key names no score, or more than one. The message says what to give instead."""


@dataclass(frozen=True)
class Score:
    """One number; `value` is None where there is none, and `reason` says why."""

    metric_id: str
    metric: str
    value: float | None
    status: str
    reason: str
    scored_at: str
    run_id: str
    environments: list[str]
    """Ids of the environments in which that run worked."""


@dataclass(frozen=True)
class Image:
    """The picture. `present`: whether its file is still kept."""

    sha256: str
    path: str
    present: bool
    width: int | None
    height: int | None
    status: str
    reason: str
    settings: dict[str, Any]
    drawn_at: str
    run_id: str
    environment: str


@dataclass(frozen=True)
class Prompt:
    """The words."""

    prompt_id: str
    prompt: str
    negative_prompt: str
    score_text: str
    title: str


@dataclass(frozen=True)
class Poster:
    """One poster of the training set. `present`: whether its training image is still kept."""

    poster_id: str
    source_names: list[str]
    image: str
    caption: str
    caption_source: str
    caption_model: str
    caption_revision: str
    present: bool


@dataclass(frozen=True)
class TrainingSet:
    """What a checkpoint was trained on. `steps`: how it came about, see
    `lineages.training_steps`."""

    version: str
    steps: list[dict[str, Any]]
    posters: list[Poster]


@dataclass(frozen=True)
class Model:
    """What the image was drawn with; of a base model only its fingerprint and kind are known."""

    checkpoint_id: str
    kind: str
    base_model: str
    settings: dict[str, Any]
    packages: dict[str, Any]
    trained_at: str
    run_id: str
    environments: list[str]
    training_set: TrainingSet | None


@dataclass(frozen=True)
class Trace:
    """Where the scores of one image come from. Times are UTC in ISO form, unknown texts ""."""

    generation_key: str
    variant: str
    seed: int
    scores: list[Score]
    image: Image
    prompt: Prompt
    model: Model
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Versions of code and packages, by id."""

    def to_json(self) -> str:
        """All of it, indented."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def trace(store: Store, databases: Sequence[Warehouse], generation_key: str) -> Trace:
    """Where the scores of the image with that key come from; a unique beginning of it is enough.

    `databases`: where to look, one after the other: the warehouse, and its published copy for the
    time that the warehouse is locked. Raises NotTraceable, WarehouseMissing and WarehouseBusy.
    """
    prefix = generation_key.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{1,64}", prefix):
        raise NotTraceable(
            f"{generation_key!r} is no generation key: those are 64 hexadecimal digits, or the "
            "first of them; see the column generation_key of clip_scores"
        )
    first: WarehouseMissing | WarehouseBusy | None = None
    for database in databases:
        try:
            with database.read() as connection:
                return _trace(store, connection, _match(connection, prefix, database.path))
        except (WarehouseMissing, WarehouseBusy) as error:
            first = first or error
    raise first or NotTraceable("no database was given to look into")


def _match(connection: duckdb.DuckDBPyConnection, prefix: str, path: Path) -> dict[str, Any]:
    query = "SELECT * FROM fct_image WHERE starts_with(generation_key, ?) ORDER BY generation_key"
    found = _rows(connection, query, [prefix])
    if not found:
        raise NotTraceable(
            f"{path}: no image has a generation key that begins with {prefix}; look it up in the "
            "column generation_key of the view clip_scores, or materialize `clip_scores` first"
        )
    if len(found) > 1:
        shown = "; ".join(
            f"{row['generation_key'][: len(prefix) + 6]}… is {row['variant']}, "
            f"{row['prompt_id']}, seed {row['seed']}"
            for row in found[:_CANDIDATES]
        )
        more = f"; and {len(found) - _CANDIDATES} more" if len(found) > _CANDIDATES else ""
        raise NotTraceable(
            f"{len(found)} images have a generation key that begins with {prefix}: {shown}{more}. "
            "Give more digits"
        )
    return found[0]


def _trace(store: Store, connection: duckdb.DuckDBPyConnection, image: dict[str, Any]) -> Trace:
    key = image["generation_key"]
    scores = [
        Score(
            metric_id=row["metric_id"],
            metric=row["label"] or row["metric_id"],
            value=row["value"],
            status=row["status"],
            reason=row["reason"],
            scored_at=_iso(row["scored_at"]),
            run_id=row["run_id"] or "",
            environments=_environments_of(connection, row["run_id"]),
        )
        for row in _rows(
            connection,
            # As the reports have it: CLIP-T is two metrics.
            "SELECT fct_score.*, CASE WHEN name = 'CLIP-T' THEN name || ' ' || preprocessing "
            "ELSE name END AS label FROM fct_score LEFT JOIN dim_metric USING (metric_id) "
            "WHERE generation_key = ? ORDER BY scored_at, metric_id",
            [key],
        )
    ]
    prompt = _first(connection, "dim_prompt", "prompt_key", image["prompt_key"])
    picture = _image(store, connection, image)
    model = _model(store, connection, str(image["checkpoint_id"]))
    ids = [picture.environment, *model.environments]
    ids += [environment for score in scores for environment in score.environments]
    if model.training_set:
        ids += [str(step["environment"]) for step in model.training_set.steps]
    return Trace(
        generation_key=key,
        variant=image["variant"],
        seed=image["seed"],
        scores=scores,
        image=picture,
        prompt=Prompt(
            prompt_id=image["prompt_id"],
            prompt=prompt.get("prompt", ""),
            negative_prompt=image["negative_prompt"],
            score_text=prompt.get("score_text", ""),
            title=prompt.get("title", ""),
        ),
        model=model,
        environments=_described(store, connection, [name for name in ids if name]),
    )


def _image(store: Store, connection: duckdb.DuckDBPyConnection, row: dict[str, Any]) -> Image:
    drawn = _first(connection, "fct_drawing", "pixel_key", row["pixel_key"])
    if not drawn:  # scored before such records were kept, or the warehouse is behind
        known = store.results(GENERATION, [row["pixel_key"]]).get(row["pixel_key"], {})
        drawn = {
            "run_id": known.get("run_id"),
            "environment_id": known.get("environment"),
            "drawn_at": moment(known.get("drawn_at")),
        }
    path = row["image_path"]
    return Image(
        sha256=row["image"],
        path=path,
        present=bool(path) and (store.root / path).exists(),
        width=row["width"],
        height=row["height"],
        status=row["status"],
        reason=row["reason"],
        settings=json.loads(row["settings"] or "{}"),
        drawn_at=_iso(drawn["drawn_at"]),
        run_id=drawn["run_id"] or "",
        environment=drawn["environment_id"] or "",
    )


def _model(store: Store, connection: duckdb.DuckDBPyConnection, checkpoint_id: str) -> Model:
    row = _first(connection, "dim_checkpoint", "checkpoint_id", checkpoint_id)
    facts = store.results(CHECKPOINT, [checkpoint_id]).get(checkpoint_id, {})
    version = row.get("training_set_version") or facts.get("training_set")
    tuned = bool(version)
    run_id = (facts.get("run_id") or row.get("run_id") or "") if tuned else ""
    environments = _environments_of(connection, run_id)
    if facts.get("environment") and facts["environment"] not in environments:
        environments.append(str(facts["environment"]))
    return Model(
        checkpoint_id=checkpoint_id,
        kind=row.get("kind") or "",
        base_model=row.get("base_model") or facts.get("base_model") or "",
        settings=facts.get("settings") or json.loads(row.get("settings") or "{}"),
        packages=facts.get("packages") or {},
        trained_at=_iso(row.get("trained_at")) or str(facts.get("recorded_at") or ""),
        run_id=run_id,
        environments=environments,
        training_set=_training_set(store, str(version), str(facts.get("lineage") or ""))
        if version
        else None,
    )


def _training_set(store: Store, version: str, name: str) -> TrainingSet:
    frame = lineage(store, version, name)
    posters = []
    for row in frame.to_dict("records") if frame is not None else []:
        image = str(row["image"])
        posters.append(
            Poster(
                poster_id=str(row["poster_id"]),
                source_names=[str(name) for name in row["source_names"]],
                image=image,
                caption=str(row["caption"]),
                caption_source=str(row["caption_source"]),
                caption_model=str(row["caption_model"]),
                caption_revision=str(row["caption_revision"]),
                present=bool(image) and store.path(image, ".png").exists(),
            )
        )
    return TrainingSet(version, training_steps(store, version, name), posters)


def _environments_of(connection: duckdb.DuckDBPyConnection, run_id: str | None) -> list[str]:
    if not run_id or not _has(connection, "run_environment"):
        return []
    query = "SELECT environment_id FROM run_environment WHERE run_id = ? ORDER BY environment_id"
    return [row["environment_id"] for row in _rows(connection, query, [run_id])]


def _described(
    store: Store, connection: duckdb.DuckDBPyConnection, environment_ids: Sequence[str]
) -> dict[str, dict[str, Any]]:
    described = store.results(ENVIRONMENT, environment_ids)
    for environment_id in dict.fromkeys(environment_ids):
        if environment_id in described:
            continue
        row = _first(connection, "dim_environment", "environment_id", environment_id)
        if row:
            packages = json.loads(row.pop("packages") or "{}")
            described[environment_id] = {**row, "commit": row["commit_id"], "packages": packages}
    return described


def _first(
    connection: duckdb.DuckDBPyConnection, table: str, column: str, value: str
) -> dict[str, Any]:
    """The row of a table with that key; empty without one, as where the file is older than it."""
    if not _has(connection, table):
        return {}
    found = _rows(connection, f"SELECT * FROM {table} WHERE {column} = ?", [value])
    return found[0] if found else {}


def _has(connection: duckdb.DuckDBPyConnection, table: str) -> bool:
    query = "SELECT table_name FROM duckdb_tables() WHERE table_name = ?"
    return bool(_rows(connection, query, [table]))


def _rows(
    connection: duckdb.DuckDBPyConnection, query: str, values: Sequence[object]
) -> list[dict[str, Any]]:
    result = connection.execute(query, list(values))
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _iso(moment: dt.datetime | None) -> str:
    return moment.replace(tzinfo=dt.UTC).isoformat(timespec="seconds") if moment else ""


# -- as a tree -----------------------------------------------------------------------------------


def as_tree(traced: Trace, *, shown_posters: int | None = SHOWN_POSTERS) -> Tree:
    """For the terminal. `shown_posters`: how many posters are listed; None for all."""
    tree = Tree(
        _line(
            traced.generation_key[:16],
            f"{traced.variant}, {traced.prompt.prompt_id}, seed {traced.seed}",
        )
    )
    scores = tree.add("scores")
    for score in traced.scores:
        number = f"{score.value:.4f}" if score.value is not None else f"none: {score.reason}"
        branch = scores.add(_line(score.metric, number))
        branch.add(_line("metric", score.metric_id))
        branch.add(_line("scored", _by(score.scored_at, score.run_id, score.environments)))
    _add_image(tree, traced.image)
    prompt = tree.add(_line("prompt", traced.prompt.prompt_id))
    prompt.add(_line("drawn from", traced.prompt.prompt))
    prompt.add(_line("negative", traced.prompt.negative_prompt or "none"))
    prompt.add(_line("scored against", traced.prompt.score_text))
    if traced.prompt.title:
        prompt.add(_line("title", traced.prompt.title))
    tree.add(_line("seed", str(traced.seed)))
    _add_model(tree, traced.model, shown_posters)
    environments = tree.add("environments")
    for environment_id, values in traced.environments.items():
        branch = environments.add(
            _line(environment_id, f"posterpipe {values['posterpipe']}, source {values['source']}")
        )
        if values.get("commit"):
            branch.add(_line("commit", values["commit"]))
        branch.add(_line("python", f"{values['python']} on {values['platform']}"))
        branch.add(_line("packages", _listed(values["packages"])))
    if not traced.environments:
        environments.add(_UNKNOWN)
    return tree


def _add_image(tree: Tree, image: Image) -> None:
    gone = "" if image.present or not image.path else " (removed since; materialize it again)"
    branch = tree.add(_line("image", f"{image.sha256[:16] or 'none'}{gone}"))
    if image.path:
        branch.add(_line("file", image.path))
    branch.add(_line("status", image.status + (f": {image.reason}" if image.reason else "")))
    branch.add(_line("settings", _listed(image.settings)))
    branch.add(_line("drawn", _by(image.drawn_at, image.run_id, [image.environment])))


def _add_model(tree: Tree, model: Model, shown_posters: int | None) -> None:
    if model.training_set is None:
        branch = tree.add(_line("base model", model.checkpoint_id))
        if model.kind == "tuned":
            branch.add(_line("training set", _UNKNOWN))
        return
    branch = tree.add(_line("checkpoint", model.checkpoint_id))
    branch.add(_line("base model", model.base_model or _UNKNOWN))
    branch.add(_line("settings", _listed(model.settings)))
    branch.add(_line("trained", _by(model.trained_at, model.run_id, model.environments)))
    if model.packages:
        branch.add(_line("packages", _listed(model.packages)))
    training_set = model.training_set
    posters = training_set.posters
    count = f"{len(posters)} posters" if posters else f"posters {_UNKNOWN}"
    trained_on = branch.add(_line("training set", f"{training_set.version[:16]}, {count}"))
    for step in training_set.steps:
        made = _by(step["made_at"], step["run_id"], [step["environment"]])
        version = f"version {step['table_version'][:12]}, code {step['code_version'] or _UNKNOWN}"
        trained_on.add(_line(step["asset"], f"{version}, {made}"))
    for poster in posters[:shown_posters]:
        name = ", ".join(poster.source_names) or f"name {_UNKNOWN}"
        leaf = trained_on.add(_line(name, poster.poster_id[:16]))
        source = poster.caption_source or f"source {_UNKNOWN}"
        leaf.add(_line("caption", f"“{poster.caption}” ({source})"))
        leaf.add(_line("image", poster.image[:16] + ("" if poster.present else " (removed since)")))
    if shown_posters is not None and len(posters) > shown_posters:
        trained_on.add(f"… and {len(posters) - shown_posters} more; --posters shows more")


def _by(moment: str, run_id: str, environments: Sequence[str]) -> str:
    parts = [moment or f"time {_UNKNOWN}", f"run {run_id or _UNKNOWN}"]
    known = ", ".join(name for name in environments if name)
    return ", ".join([*parts, f"environment {known or _UNKNOWN}"])


def _listed(values: Mapping[str, Any]) -> str:
    known = [f"{name} {value}" for name, value in values.items() if value is not None]
    return ", ".join(known) or _UNKNOWN


def _line(label: str, value: str) -> Text:
    # Text, not markup: brackets in a caption are part of it.
    return Text.assemble((label, "bold"), "  ", value)
