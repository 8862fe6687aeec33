"""Provenance: a score is told down to its posters, and a checkpoint knows what it is."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from posterpipe.cli import app
from posterpipe.core.housekeeping.garbage import find_garbage, remove_garbage
from posterpipe.core.provenance import environments
from posterpipe.core.provenance.checkpoints import CheckpointMismatch, require_checkpoint
from posterpipe.core.provenance.environments import environment, record_environment
from posterpipe.core.provenance.lineages import (
    current_lineage,
    describe_difference,
    lineage,
    lineage_path,
    training_steps,
)
from posterpipe.core.provenance.records import record_table
from posterpipe.core.store import Store
from posterpipe.core.trace import NotTraceable, as_tree, trace
from posterpipe.core.training.training_set import build_training_set
from posterpipe.core.warehouse.database import Warehouse, WarehouseMissing
from posterpipe.core.warehouse.history import record_history
from posterpipe.core.warehouse.publication import publish_scores
from posterpipe.core.warehouse.rows import insert, record_generations
from posterpipe_tests.core.housekeeping.test_garbage import age
from posterpipe_tests.core.warehouse.test_database import generation, score

NOW = dt.datetime(2026, 1, 2, 3, 4, 5)
PIXELS = "5" * 64
KEY, OTHER = "ab12" + "0" * 60, "ab13" + "0" * 60


@dataclass
class Study:
    """One pass through the chain, without models: real tables, records and warehouse."""

    store: Store
    warehouse: Warehouse
    trained_on: str = ""
    checkpoint_id: str = "c" * 16

    @property
    def folder(self) -> Path:
        return self.store.root / "checkpoints" / self.checkpoint_id

    def dataset(
        self, captions: dict[str, tuple[str, str]], run_id: str = "run 1", scan: str = ""
    ) -> str:
        """Posters by source name, with caption and its source, as far as a training set; its
        version. Posters of another `scan` are other files of the same pixels."""
        store = self.store
        posters = {name: store.put(f"poster {name}{scan}".encode()) for name in captions}
        images = {name: store.put(f"image {name}".encode(), ".png") for name in captions}
        raw = pd.DataFrame(
            {"poster_id": posters.values(), "source_name": posters.keys(), "status": "ok"}
        )
        resized = pd.DataFrame(
            {"poster_id": posters.values(), "image": images.values(), "status": "ok"}
        )
        captioned = pd.DataFrame(
            [
                {
                    "poster_id": posters[name],
                    "caption": caption,
                    "source": source,
                    "model": "blip" if source == "model" else "",
                    "revision": "f00d" if source == "model" else "",
                    "status": "ok",
                }
                for name, (caption, source) in captions.items()
            ]
        )
        training, _, version = build_training_set(store, resized, captioned)
        training = training.assign(training_set=version)
        versions: dict[str, str] = {}
        for name, frame, inputs in [
            ("raw_posters", raw, []),
            ("resized_posters", resized, ["raw_posters"]),
            ("poster_captions", captioned, ["resized_posters"]),
            ("training_csv", training, ["resized_posters", "poster_captions"]),
        ]:
            versions[name] = store.write_table(name, frame)
            record_table(
                store,
                name,
                versions[name],
                run_id=run_id,
                code_version=f"1 of {name}",
                inputs={used: versions[used] for used in inputs},
            )
        return version

    def train(self, training_set: str) -> None:
        """A finished checkpoint, without weights."""
        self.trained_on = training_set
        self.folder.mkdir(parents=True)
        said = {
            "checkpoint_id": self.checkpoint_id,
            "training_set": training_set,
            "base_model": "base1",
            "settings": {"learning_rate": 1e-6, "max_train_steps": 4},
            "packages": {"torch": "2.13.0"},
            "reports": [{"step": 1}],
        }
        (self.folder / "posterpipe.json").write_text(json.dumps(said))
        table = pd.DataFrame(
            [
                {
                    "checkpoint_id": self.checkpoint_id,
                    "path": f"checkpoints/{self.checkpoint_id}",
                    "training_set": training_set,
                    "base_model": "base1",
                }
            ]
        )
        version = self.store.write_table("dreambooth_checkpoint", table)
        record_table(
            self.store,
            "dreambooth_checkpoint",
            version,
            run_id="run 2",
            code_version="1",
            inputs={},
        )

    def draw_and_score(self) -> str:
        """One tuned image; the hash of its file."""
        image = self.store.put(b"drawn", ".png")
        row = {
            "image": image,
            "status": "ok",
            "reason": "",
            "run_id": "run 3",
            "environment": record_environment(self.store),
            "drawn_at": "2026-01-02T00:00:00+00:00",
        }
        self.store.add_results("generation", {PIXELS: row})
        path = self.store.path(image, ".png").relative_to(self.store.root).as_posix()
        frame = pd.DataFrame(
            [
                generation(
                    KEY,
                    "dreambooth",
                    pixel_key=PIXELS,
                    checkpoint_id=self.checkpoint_id,
                    image=image,
                    image_path=path,
                    settings='{"num_inference_steps": 25}',
                ),
                generation(OTHER, "sd", pixel_key="6" * 64),
            ]
        )
        scores = pd.DataFrame([{**score(key, 0.25), "run_id": "run 4"} for key in (KEY, OTHER)])
        with self.warehouse.write() as connection:
            record_generations(connection, frame, run_id="run 4", recorded_at=NOW)
            insert(connection, "fct_score", scores)
        record_history(self.store, self.warehouse, frame, run_id="run 4")
        return image


@pytest.fixture
def study(tmp_path: Path) -> Study:
    store = Store(tmp_path / "store")
    return Study(store, Warehouse(store.root / "warehouse.duckdb", busy_seconds=0.3))


CAPTIONS = {
    "rocket.png": ("a rocket", "model"),
    "cat.jpg": ("a [bold]cat[/] by hand", "human"),
    "tree.png": ("a tree", "model"),
}


# -- records -------------------------------------------------------------------------------------


def test_an_environment_names_code_and_packages_and_no_path() -> None:
    values = environment()
    assert values["packages"]["torch"] and values["packages"]["duckdb"]
    assert values["python"].count(".") == 2
    assert len(values["source"]) == 12
    assert "/" not in json.dumps(values)


def test_the_source_hash_changes_with_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "posterpipe" / "core" / "provenance" / "environments.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    (module.parent / "images.py").write_text("VERSION = 1")
    monkeypatch.setattr(environments, "__file__", str(module))
    before = environments._source_hash()
    assert environments._source_hash() == before
    (module.parent / "images.py").write_text("VERSION = 2")
    assert environments._source_hash() != before


def test_a_table_remembers_who_made_it_first(study: Study) -> None:
    study.dataset(CAPTIONS, "run 1")
    training_set = study.dataset(CAPTIONS, "run 9")
    steps = training_steps(study.store, training_set)
    assert [step["asset"] for step in steps] == [
        "training_csv",
        "poster_captions",
        "resized_posters",
        "raw_posters",
    ]
    assert {step["run_id"] for step in steps} == {"run 1"}
    assert steps[1]["code_version"] == "1 of poster_captions"
    assert len({step["environment"] for step in steps}) == 1


def test_the_posters_of_a_training_set_are_written_down(study: Study) -> None:
    store = study.store
    version = study.dataset(CAPTIONS)
    frame = lineage(store, version)
    assert frame is not None
    rows = {row["source_names"][0]: row for row in frame.to_dict("records")}
    assert rows.keys() == CAPTIONS.keys()
    assert rows["cat.jpg"]["poster_id"] == store.put(b"poster cat.jpg")
    assert rows["cat.jpg"]["caption_source"] == "human"
    assert rows["cat.jpg"]["caption_model"] == ""
    assert (rows["tree.png"]["caption_model"], rows["tree.png"]["caption_revision"]) == (
        "blip",
        "f00d",
    )


def test_a_training_set_that_came_about_otherwise_is_told_as_it_was_for_each_checkpoint(
    study: Study,
) -> None:
    blip = {"rocket.png": ("a rocket", "model")}
    by_hand = {"rocket.png": ("a rocket", "human")}
    versions = []
    for number, (captions, scan) in enumerate([(blip, ""), (by_hand, ""), (blip, " again")]):
        versions.append(study.dataset(captions, f"run {number}", scan=scan))
        study.checkpoint_id = f"{number}" * 16
        study.train(versions[-1])
    assert len(set(versions)) == 1, "the trainer sees one training set"
    first, second = (study.store.put(b"poster rocket.png" + scan) for scan in (b"", b" again"))
    told = []
    for number in range(3):
        study.checkpoint_id = f"{number}" * 16
        study.warehouse.path.unlink(missing_ok=True)
        study.draw_and_score()
        model = trace(study.store, [study.warehouse], KEY).model
        assert model.training_set is not None
        (poster,) = model.training_set.posters
        told.append((poster.poster_id, poster.caption_source))
        assert model.training_set.steps[0]["run_id"] == f"run {number}"
    assert told == [(first, "model"), (first, "human"), (second, "model")]
    frame = lineage(study.store, versions[0])
    assert frame is not None and frame["poster_id"].tolist() == [second]


def test_the_only_lineage_of_an_older_store_is_read(study: Study) -> None:
    store = study.store
    version = study.dataset(CAPTIONS)
    name = current_lineage(store, version)
    frame = lineage(store, version)
    steps = training_steps(store, version)
    # As it was written before lineages had names.
    lineage_path(store, version, name).rename(lineage_path(store, version))
    (store.root / "lineages" / f"{version}.json").unlink()
    known = store.results("training_set", [f"{version}/{name}"])
    store.forget_results("training_set", known)
    store.add_results("training_set", {version: known[f"{version}/{name}"]})
    again = lineage(store, version)
    assert frame is not None and again is not None
    pd.testing.assert_frame_equal(again, frame)
    assert training_steps(store, version) == steps != []


# -- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_is_used_as_what_it_is(study: Study) -> None:
    study.train(study.dataset(CAPTIONS))
    require_checkpoint(
        study.store,
        study.folder,
        checkpoint_id=study.checkpoint_id,
        training_set=study.trained_on,
        base_model="base1",
    )


def test_a_checkpoint_of_another_training_set_is_refused_with_the_difference(
    study: Study,
) -> None:
    study.train(study.dataset(CAPTIONS))
    now = {
        "rocket.png": ("a red rocket", "human"),
        "cat.jpg": CAPTIONS["cat.jpg"],
        **{f"new {n}.png": (f"new {n}", "model") for n in range(5)},
    }
    wanted = study.dataset(now)
    with pytest.raises(CheckpointMismatch) as refused:
        require_checkpoint(
            study.store,
            study.folder,
            checkpoint_id="d" * 16,
            training_set=wanted,
            base_model="base1",
        )
    text = str(refused.value)
    assert str(study.folder) in text and "d" * 16 in text and study.checkpoint_id in text
    assert "5 posters added: " in text and " and 2 more" in text
    assert "1 poster removed: tree.png" in text
    assert "1 poster re-captioned: rocket.png: “a rocket” became “a red rocket”" in text
    assert "materialize dreambooth_checkpoint again" in text


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"base_model": "base2"}, "tuned from the base model base1, and not from base2"),
        ({"checkpoint_id": "d" * 16}, "max_train_steps 4 instead of 8"),
    ],
    ids=["base model", "settings"],
)
def test_a_checkpoint_made_otherwise_is_refused(
    study: Study, asked: dict[str, str], words: str
) -> None:
    study.train(study.dataset(CAPTIONS))
    other = {"settings": {"learning_rate": 1e-6, "max_train_steps": 8}}
    study.store.add_results("checkpoint", {"d" * 16: other})
    wanted = {
        "checkpoint_id": study.checkpoint_id,
        "training_set": study.trained_on,
        "base_model": "base1",
        **asked,
    }
    with pytest.raises(CheckpointMismatch, match=words):
        require_checkpoint(study.store, study.folder, **wanted)


def test_a_folder_that_is_no_checkpoint_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"no good posterpipe\.json"):
        require_checkpoint(
            study.store, tmp_path, checkpoint_id="c", training_set="t", base_model="b"
        )


def test_differences_are_told_for_sets_that_no_step_recorded(study: Study) -> None:
    store = study.store
    for name, rows in [("1" * 64, "a.png,red\nb.png,blue\n"), ("2" * 64, "a.png,green\n")]:
        folder = store.folder("training_sets", name)
        (folder / "training.csv").write_text("file_name,caption\n" + rows)
    told = describe_difference(store, "1" * 64, "2" * 64)
    assert told == "1 poster removed: b.png; 1 poster re-captioned: a.png: “red” became “green”"
    assert "nothing is kept of 333" in describe_difference(store, "1" * 64, "3" * 64)


# -- trace ---------------------------------------------------------------------------------------


def test_a_score_is_traced_down_to_the_posters(study: Study) -> None:
    study.train(study.dataset(CAPTIONS))
    image = study.draw_and_score()
    traced = trace(study.store, [study.warehouse], KEY)

    (number,) = traced.scores
    assert (number.value, number.run_id, number.status) == (0.25, "run 4", "ok")
    assert traced.image.sha256 == image and traced.image.present
    assert (traced.image.run_id, traced.image.drawn_at) == ("run 3", "2026-01-02T00:00:00+00:00")
    assert traced.image.settings == {"num_inference_steps": 25}
    assert (traced.prompt.prompt, traced.prompt.score_text) == ("a rocket 'Orbit'", "a rocket")
    assert traced.seed == 2**32 - 1

    model = traced.model
    assert (model.checkpoint_id, model.kind, model.base_model) == ("c" * 16, "tuned", "base1")
    assert model.settings["max_train_steps"] == 4
    assert model.packages == {"torch": "2.13.0"}
    assert model.run_id == "run 2"
    assert model.training_set is not None
    assert model.training_set.version == study.trained_on
    assert {step["run_id"] for step in model.training_set.steps} == {"run 1"}
    posters = {poster.source_names[0]: poster for poster in model.training_set.posters}
    assert posters.keys() == CAPTIONS.keys()
    assert posters["cat.jpg"].caption_source == "human"
    assert posters["cat.jpg"].poster_id == study.store.put(b"poster cat.jpg")
    assert posters["cat.jpg"].present

    here = record_environment(study.store)
    assert number.environments == model.environments == [here]
    assert traced.environments[here]["packages"] == environment()["packages"]
    assert json.loads(traced.to_json())["model"]["training_set"]["posters"]


def test_the_warehouse_tells_analysts_the_same(study: Study) -> None:
    study.train(study.dataset(CAPTIONS))
    study.draw_and_score()
    with study.warehouse.read() as connection:
        drawn = connection.execute(
            "SELECT d.run_id, e.posterpipe FROM fct_image JOIN fct_drawing AS d USING (pixel_key) "
            "JOIN dim_environment AS e USING (environment_id)"
        ).fetchall()
        trained = connection.execute(
            "SELECT training_set_version, base_model, run_id FROM dim_checkpoint "
            "WHERE kind = 'tuned'"
        ).fetchall()
    assert drawn == [("run 3", environment()["posterpipe"])]
    assert trained == [(study.trained_on, "base1", "run 2")]


def test_a_run_that_scored_nothing_new_leaves_no_history(study: Study) -> None:
    study.train(study.dataset(CAPTIONS))
    study.draw_and_score()

    def rows() -> list[list[tuple]]:
        tables = ("fct_drawing", "dim_checkpoint", "run_environment", "dim_environment")
        with study.warehouse.read() as connection:
            return [connection.execute(f"FROM {name} ORDER BY ALL").fetchall() for name in tables]

    before = rows()
    frame = pd.DataFrame([generation(KEY, pixel_key=PIXELS, checkpoint_id=study.checkpoint_id)])
    record_history(study.store, study.warehouse, frame, run_id="run 5")
    assert rows() == before


def test_the_history_of_a_score_outlives_what_it_was_made_from(study: Study) -> None:
    study.train(study.dataset(CAPTIONS))
    study.draw_and_score()
    before = trace(study.store, [study.warehouse], KEY)
    for n in range(4):
        study.dataset({f"other {n}.png": (f"other {n}", "model")})
        study.store.write_table("dreambooth_checkpoint", pd.DataFrame({"checkpoint_id": [str(n)]}))
    age(study.store.root)
    garbage = find_garbage(study.store, keep_versions=1)
    remove_garbage(study.store, garbage)
    assert {"blobs", "checkpoints", "training sets", "results"} <= {
        item.kind for item in garbage.items
    }
    assert not study.folder.exists()
    after = trace(study.store, [study.warehouse], KEY)
    assert not after.image.present
    assert after.image.run_id == before.image.run_id == "run 3"
    assert after.model.settings == before.model.settings
    assert before.model.training_set and after.model.training_set
    assert [p.poster_id for p in after.model.training_set.posters] == [
        p.poster_id for p in before.model.training_set.posters
    ]
    assert after.model.training_set.steps == before.model.training_set.steps
    assert not any(poster.present for poster in after.model.training_set.posters)
    assert after.environments == before.environments


def shown(study: Study, key: str, posters: int = 10) -> str:
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(as_tree(trace(study.store, [study.warehouse], key), shown_posters=posters))
    return console.export_text()


def test_the_tree_shows_every_fact(study: Study) -> None:
    study.train(study.dataset(CAPTIONS))
    image = study.draw_and_score()
    text = shown(study, KEY)
    for fact in [
        KEY[:16], "dreambooth, rocket, seed 4294967295", "0.2500", image[:16], "run 4",
        "a rocket 'Orbit'", "num_inference_steps 25", "run 3", "c" * 16, "max_train_steps 4",
        "run 2", f"{study.trained_on[:16]}, 3 posters", "raw_posters", "code 1 of training_csv",
        "“a [bold]cat[/] by hand” (human)", "tree.png",
        f"duckdb {environment()['packages']['duckdb']}",
    ]:  # fmt: skip
        assert fact in text, fact
    assert "not recorded" not in text
    few = shown(study, KEY, posters=1)
    assert "and 2 more; --posters shows more" in few


def test_the_command_cuts_nothing_off_in_a_narrow_terminal(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.train(study.dataset(CAPTIONS))
    study.draw_and_score()
    monkeypatch.setenv("POSTERPIPE_STORE", str(study.store.root))
    monkeypatch.setenv("COLUMNS", "80")
    printed = CliRunner().invoke(app, ["trace", KEY]).output.splitlines()
    traced = trace(study.store, [study.warehouse], KEY)
    (known,) = traced.environments.values()
    packages = ", ".join(f"{name} {version}" for name, version in known["packages"].items())
    for label, value in {
        "file": traced.image.path,
        "drawn": f"2026-01-02T00:00:00+00:00, run run 3, environment {traced.image.environment}",
        "packages": packages,
        "python": f"{known['python']} on {known['platform']}",
    }.items():
        assert any(line.endswith(f"{label}  {value}") for line in printed), (label, printed)


def test_an_image_of_the_base_model_has_no_training_set(study: Study) -> None:
    study.train(study.dataset(CAPTIONS))
    study.draw_and_score()
    traced = trace(study.store, [study.warehouse], OTHER)
    assert traced.model.kind == "base" and traced.model.training_set is None
    text = shown(study, OTHER)
    assert "base model  base1" in text
    assert "run not recorded" in text  # nobody wrote down who drew it


def test_a_unique_beginning_is_enough_and_others_are_named(study: Study) -> None:
    study.train(study.dataset(CAPTIONS))
    study.draw_and_score()
    assert trace(study.store, [study.warehouse], " AB12").generation_key == KEY
    with pytest.raises(NotTraceable, match=r"2 images .* begins with ab1: .*dreambooth, rocket"):
        trace(study.store, [study.warehouse], "ab1")
    with pytest.raises(NotTraceable, match="begins with abff; look it up in the column"):
        trace(study.store, [study.warehouse], "abff")
    with pytest.raises(NotTraceable, match="'rocket' is no generation key"):
        trace(study.store, [study.warehouse], "rocket")


def test_before_the_first_score_the_error_says_what_to_do(study: Study) -> None:
    with pytest.raises(WarehouseMissing, match="materialize the asset `clip_scores`"):
        trace(study.store, [study.warehouse], KEY)


def test_the_published_copy_answers_while_the_warehouse_is_written(
    study: Study, tmp_path: Path
) -> None:
    study.train(study.dataset(CAPTIONS))
    study.draw_and_score()
    published = publish_scores(study.warehouse.path, tmp_path / "public", run_id="run").database
    with study.warehouse.write():
        traced = trace(study.store, [study.warehouse, Warehouse(published)], KEY)
    assert traced.image.run_id == "run 3"
