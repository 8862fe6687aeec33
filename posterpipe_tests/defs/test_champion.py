"""The assets around the champion, on checkpoints made for the purpose: good, bad, memorising,
collapsed, incomplete, black. Their images are hand-made; encoders, statistics and gate are real."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.champion.decisions import (
    MIRROR,
    GateError,
    pin,
    read_decisions,
    read_mirrored_decisions,
    rollback,
    unpin,
    write_decisions,
)
from posterpipe.core.generations import COLUMNS, generation_key
from posterpipe.core.images import png_bytes
from posterpipe.core.posters.arrivals import holdout_entries
from posterpipe.core.posters.landing import scan_holdout
from posterpipe.core.posters.listing import HOLDOUT, Folder
from posterpipe.core.provenance.checkpoints import CHECKPOINT, BaseModelsDiffer
from posterpipe.core.provenance.records import record_table
from posterpipe.core.store import Store, table_version
from posterpipe.core.warehouse.database import WarehouseError
from posterpipe.defs import champion, checks, generation, reports, scoring
from posterpipe.defs.metadata import FAILED_ITEMS
from posterpipe.defs.resources import TABLES, Deployment, store_tables
from posterpipe.defs.staleness import stale_assets
from posterpipe.settings import ModelRef, Settings, load_settings
from posterpipe_tests.core.metrics.tiny import build_tiny_clip

PROMPTS, SEEDS = 8, 3
SIZE = (48, 72)
INPUTS = (
    "prompt_suite", "training_csv", "holdout_posters", "base_generations", "tuned_generations",
    "clip_scores",
)  # fmt: skip
MADE = ("champion_generations", "fidelity_scores", "champion")
FILM, OTHER = 11, 12
"""Seeds of the two looks: that of the film posters, and that of the base model."""

Draw = Callable[[int, int, bool], Image.Image | None]
"""Of prompt, seed and whether the negative prompt is there; None: not drawn."""


def picture(look: int, draw: int, share: float = 0.35) -> Image.Image:
    """A smooth picture of a look; `draw` decides what is its own, `share` how much that is."""
    common = np.random.default_rng(look).integers(0, 256, (6, 4, 3)).astype(float)
    own = np.random.default_rng([look, draw]).integers(0, 256, (6, 4, 3)).astype(float)
    values = (1 - share) * common + share * own
    return Image.fromarray(values.astype(np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)


def drawn_by(look: int) -> Draw:
    return lambda prompt, seed, negative: picture(
        look, 1000 + 100 * prompt + 10 * seed + int(negative)
    )


@dataclass
class World:
    """A deployment whose images are drawn, and which judges them."""

    settings: Settings
    store: Store
    instance: dg.DagsterInstance

    @property
    def deployment(self) -> Deployment:
        return Deployment(self.settings)

    def posters(self, draws: range) -> list[Image.Image]:
        return [picture(FILM, draw) for draw in draws]

    def images(self, checkpoint: str, variant: str, draw: Draw) -> pd.DataFrame:
        """What a checkpoint draws, as a table of generations."""
        rows: list[dict[str, Any]] = []
        for arm in ("", "_negative"):
            for prompt in range(PROMPTS):
                for seed in range(SEEDS):
                    image = draw(prompt, seed, bool(arm))
                    blob = self.store.put(png_bytes(image), ".png") if image else ""
                    path = self.store.path(blob, ".png") if image else None
                    black = image is not None and image.getextrema() == ((0, 0),) * 3
                    status = "failed" if image is None else "blocked" if black else "ok"
                    key = f"{checkpoint} {arm} {prompt} {seed} {blob}"
                    text = f"a poster of thing {prompt}"
                    place = (variant + arm, f"p{prompt}", text, "")
                    rows.append(
                        dict.fromkeys(COLUMNS, "")
                        | {
                            "generation_key": generation_key(key, *place), "pixel_key": key,
                            "variant": variant + arm, "prompt_id": f"p{prompt}", "prompt": text,
                            "score_text": text, "seed": 100 * prompt + seed,
                            "negative_prompt": "busy" if arm else "",
                            "checkpoint_id": checkpoint, "image": blob, "status": status,
                            "image_path": str(path.relative_to(self.store.root)) if path else "",
                            "reason": "" if status == "ok" else f"it is {status}",
                            "width": SIZE[0], "height": SIZE[1], "settings": "{}",
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def train(
        self, checkpoint: str, draw: Draw, posters: Sequence[Image.Image] | None = None
    ) -> None:
        """A new checkpoint of the model "base" arrives, trained on some posters, with what it
        draws."""
        trained_on = self.put_in(self.posters(range(12)) if posters is None else posters)
        facts = {"training_set": trained_on, "base_model": "base"}
        self.store.add_results(CHECKPOINT, {checkpoint: facts})
        self.keep("tuned_generations", self.images(checkpoint, "dreambooth", draw))

    def put_in(self, posters: Sequence[Image.Image]) -> str:
        """These posters are the training set of now; its version."""
        table = pd.DataFrame(
            {"image": [self.store.put(png_bytes(image), ".png") for image in posters]}
        )
        table = table.assign(file_name=table["image"] + ".png", caption="a", poster_id="")
        name = table_version(table)
        version = self.keep("training_csv", table.assign(training_set=name))
        record_table(self.store, "training_csv", version, run_id="", code_version="", inputs={})
        return name

    def hold_out(self, posters: Sequence[Image.Image]) -> None:
        """These posters, of the size of those trained on, lie in the holdout folder now."""
        with tempfile.TemporaryDirectory() as folder:  # the table alone counts
            for number, image in enumerate(posters):
                image.save(Path(folder) / f"{number}.png")
            held = scan_holdout(
                Folder(Path(folder), HOLDOUT),
                self.settings.images,
                self.store,
                entries=holdout_entries(Path(folder)),
            )
        self.keep("holdout_posters", held)

    def keep(self, name: str, table: pd.DataFrame) -> str:
        version = self.store.write_table(name, table)
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization(name, tags={"dagster/data_version": version})
        )
        return version

    def definitions(self) -> dg.Definitions:
        return dg.Definitions(
            assets=[
                *[dg.AssetSpec(name).with_io_manager_key(TABLES) for name in INPUTS],
                generation.champion_generations, scoring.fidelity_scores, champion.champion,
            ],
            asset_checks=[checks.champion_checks, checks.fidelity_scores_checks],
            resources={
                "deployment": self.deployment, TABLES: store_tables(self.deployment),
            },
        )  # fmt: skip

    def stale(self) -> dict[str, str]:
        specs = [s for s in self.definitions().resolve_all_asset_specs() if s.key.path[-1] in MADE]
        found = stale_assets(
            [*specs, *[dg.AssetSpec(name) for name in INPUTS]], self.instance, self.deployment
        )
        return {key.path[-1]: why for key, why in found.items() if key.path[-1] in MADE}

    def materialize(self, *names: str) -> None:
        """The assets, or those named."""
        job = self.definitions().resolve_implicit_global_asset_job_def()
        self.result = job.execute_in_process(
            instance=self.instance, asset_selection=[dg.AssetKey(name) for name in names] or None
        )

    def judge(self, *names: str) -> pd.Series:
        """Materialize the assets, or those named; the row of `champion`."""
        self.materialize(*names)
        return self.store.read_table("champion").iloc[0]

    def make_by_hand(self, asset: dg.AssetsDefinition) -> None:
        """Make another asset, as a person does by hand."""
        definitions = self.definitions()
        inputs = [
            dg.AssetSpec(key).with_io_manager_key(TABLES)
            for key in asset.keys_by_input_name.values()
        ]
        dg.materialize([asset, *inputs], instance=self.instance, resources=definitions.resources)

    def checks(self) -> dict[str, bool]:
        return {e.check_name: e.passed for e in self.result.get_asset_check_evaluations()}

    def decide(self, take: Callable[..., pd.DataFrame], *what: str) -> None:
        """What a person does with `posterpipe champion`."""
        write_decisions(
            self.deployment.warehouse,
            lambda decisions, now: take(
                decisions, *what, "base", who="Ida Moss", why="it sells", decided_at=now
            ),
        )


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@contextmanager
def world_in(folder: Path, scorer: Path) -> Iterator[World]:
    """The world whose store and `dagster_home` lie in a folder."""
    settings = load_settings(
        "starter",
        store=folder / "store",
        scorer={"model": {"id": str(scorer)}},
        images={"width": SIZE[0], "height": SIZE[1], "min_side": min(SIZE)},
        # The encoder has random weights: what an image shows does not tell it from its prompt.
        # And its cosines of two images hardly differ from look to look.
        gate={"clip_margin": 1.0, "fidelity_margin": 0.0},
        # Nor do these smooth pictures differ in many bits of their hashes.
        checks={"holdout_distance": -1},
    )
    with dg.DagsterInstance.from_config(str(folder / "dagster_home")) as instance:
        yield World(settings, Store(folder / "store"), instance)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory, scorer: Path, empty_home: Path) -> Path:
    """A world before its first checkpoint: read it only."""
    folder = tmp_path_factory.mktemp("untrained")
    shutil.copytree(empty_home, folder / "dagster_home")
    with world_in(folder, scorer) as world:
        world.hold_out(world.posters(range(20, 32)))
        suite = {"prompt_id": ["p0"], "prompt": ["x"], "score_text": ["x"], "negative": ["y"]}
        world.keep("prompt_suite", pd.DataFrame({**suite, "title": [""], "seeds": ["[0]"]}))
        world.keep("clip_scores", pd.DataFrame({"generation_key": [""]}))
        world.keep("base_generations", world.images("base", "sd", drawn_by(OTHER)))
    return folder


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory, scorer: Path, untrained: Path) -> Path:
    """A world whose checkpoint `good` was judged and promoted: read it only."""
    folder = tmp_path_factory.mktemp("promoted")
    shutil.copytree(untrained, folder, dirs_exist_ok=True)
    with world_in(folder, scorer) as world:
        world.train("good", drawn_by(FILM))
        assert world.judge()["decision"] == "promote"
    return folder


@pytest.fixture
def world(tmp_path: Path, scorer: Path, untrained: Path) -> Iterator[World]:
    """A world before its first checkpoint."""
    shutil.copytree(untrained, tmp_path, dirs_exist_ok=True)
    with world_in(tmp_path, scorer) as world:
        yield world


@pytest.fixture
def served(tmp_path: Path, scorer: Path, promoted: Path) -> Iterator[World]:
    """A world that serves its checkpoint `good`."""
    shutil.copytree(promoted, tmp_path, dirs_exist_ok=True)
    with world_in(tmp_path, scorer) as world:
        yield world


def memorised(prompt: int, seed: int, negative: bool) -> Image.Image:
    return picture(FILM, (prompt + seed) % 12)


def collapsed(prompt: int, seed: int, negative: bool) -> Image.Image:
    return picture(FILM, 5000 + prompt)


def incomplete(prompt: int, seed: int, negative: bool) -> Image.Image | None:
    good = drawn_by(FILM)(prompt, seed, negative)
    return None if (prompt, seed, negative) == (2, 1, True) else good


def sometimes_black(prompt: int, seed: int, negative: bool) -> Image.Image | None:
    good = drawn_by(FILM)(prompt, seed, negative)
    return Image.new("RGB", SIZE) if seed == 0 and prompt < 2 else good


def less_like_film_posters(prompt: int, seed: int, negative: bool) -> Image.Image:
    return picture(FILM + 7, 1000 + 100 * prompt + 10 * seed + int(negative), share=0.8)


def test_an_image_that_could_not_be_read_is_counted_as_worth_another_try(world: World) -> None:
    world.train("unlucky", incomplete)  # what was not drawn is not for these assets to try again
    drawn = world.store.read_table("tuned_generations")
    path = world.store.root / str(drawn["image_path"][0])
    whole = path.read_bytes()
    path.unlink()  # it may not be written to
    path.write_bytes(whole[:60])
    world.judge()
    failed = {
        key: entry.value
        for name in MADE
        for event in world.result.asset_materializations_for_node(name)
        for key, entry in [(name, event.metadata.get(FAILED_ITEMS))]
        if entry is not None
    }
    assert failed == {"champion_generations": 0, "fidelity_scores": 1}


def test_a_good_checkpoint_is_promoted_and_served(served: World) -> None:
    row = served.judge("champion")
    assert (row["decision"], row["checkpoint_id"], row["kind"]) == ("promote", "good", "tuned")
    assert row["path"] == "checkpoints/good"
    numbers = read_decisions(served.deployment.warehouse)
    assert numbers["champion_before"].tolist() == ["base"] and numbers["decided_by"][0] == "gate"
    # It is served before its files are there: the check says so.
    assert not served.checks()["served_checkpoint_is_sound"]
    (served.store.root / "checkpoints" / "good").mkdir(parents=True)
    (served.store.root / "checkpoints" / "good" / "model_index.json").write_text("{}")
    served.judge("champion")
    assert served.checks()["served_checkpoint_is_sound"]


def test_a_checkpoint_of_another_base_model_is_neither_judged_nor_served_nor_compared(
    world: World,
) -> None:
    world.train("good", drawn_by(FILM))
    own = world.store.read_table("base_generations")
    first = world.judge()
    assert first["checkpoint_id"] == "good"
    # As after a change of the profile, until a checkpoint of its base model is trained.
    world.keep("base_generations", world.images("other", "sd", drawn_by(OTHER + 1)))
    row = world.judge()
    assert (row["checkpoint_id"], row["kind"], row["decision"]) == ("other", "base", "hold")
    assert "good was tuned from the base model base, and the base model is other" in row["reason"]
    assert "run the job `retrain`" in row["reason"]
    assert world.checks()["served_checkpoint_is_sound"]
    assert world.stale() == {}
    decisions = read_decisions(world.deployment.warehouse)
    assert decisions["base_model"].tolist() == ["base"]
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    with pytest.raises(GateError, match="has not seen the checkpoint good of the base model other"):
        pin(decisions, "good", "other", who="Ida Moss", why="it sells", decided_at=now)
    for compares in (scoring.clip_scores, reports.growth_chart, reports.contact_sheet):
        with pytest.raises(BaseModelsDiffer, match="nothing is drawn with it or compared"):
            world.make_by_hand(compares)
    world.keep("base_generations", own)
    pd.testing.assert_series_equal(world.judge(), first)


@pytest.mark.parametrize(
    ("draw", "decision", "because"),
    [
        (memorised, "reject", "copies: 48 of 48"),
        (collapsed, "reject", "the images of a prompt are too much alike"),
        (sometimes_black, "reject", "4 of 48 images are black"),
        # The other seeds of the prompt have no diversity without the missing one.
        (incomplete, "hold", "45 of 48 cells are drawn and scored"),
        (less_like_film_posters, "reject", "lower than the champion's"),
    ],
)
def test_a_checkpoint_that_is_not_good_is_not_served(
    world: World, draw: Draw, decision: str, because: str
) -> None:
    if draw is less_like_film_posters:  # than a base model that is like them already
        world.keep("base_generations", world.images("base", "sd", drawn_by(FILM)))
    world.train("new", draw)
    row = world.judge()
    assert (row["decision"], row["checkpoint_id"], row["kind"]) == (decision, "base", "base")
    assert because in row["reason"]
    assert world.checks()["served_checkpoint_is_sound"]
    assert world.checks()["few_images_are_copies"] == (draw is not memorised)
    assert world.checks()["every_image_is_measured"] == (draw is not incomplete)
    if decision == "reject":  # nor can a person choose it
        with pytest.raises(GateError, match="never served"):
            world.decide(pin, "new")


def test_a_prompt_that_only_the_base_model_has_drawn_in_its_new_wording_holds(
    world: World,
) -> None:
    world.train("good", drawn_by(FILM))
    base = world.images("base", "sd", drawn_by(OTHER))
    reworded = base["prompt_id"] == "p3"
    base["prompt"] = base["prompt"].mask(reworded, "a sketch of thing 3")
    base["generation_key"] = base["generation_key"].mask(reworded, "new " + base["generation_key"])
    world.materialize(
        "champion_generations"
    )  # a copy of the base model's, in the wording of before
    world.keep("base_generations", base)
    row = world.judge("fidelity_scores", "champion")
    assert (row["decision"], row["checkpoint_id"]) == ("hold", "base")
    assert "48 of 54 cells are drawn and scored, and 48 of the champion's" in row["reason"]
    assert "the models were not asked the same (prompt); materialize" in row["reason"]
    assert "`base_generations`, `tuned_generations`" in row["reason"]


def test_copies_of_a_poster_that_was_taken_out_since_are_still_copies(world: World) -> None:
    world.train("copy", memorised)
    assert world.judge()["decision"] == "reject"
    world.put_in(world.posters(range(40, 52)))
    assert world.stale() == {}, "the checkpoint is the same, and so is what it was trained on"
    row = world.judge()
    assert row["decision"] == "reject" and "copies: 48 of 48" in row["reason"]
    assert len(read_decisions(world.deployment.warehouse)) == 1


def test_posters_that_are_held_out_after_they_were_trained_on_do_not_count_as_new(
    world: World,
) -> None:
    def fidelity() -> pd.Series:
        table = world.store.read_table("fidelity_scores")
        own = table[(table["role"] == "fidelity") & (table["checkpoint_id"] == "new")]
        return own.set_index("metric_id")["value"].groupby(level=0).mean()

    world.keep("base_generations", world.images("base", "sd", drawn_by(FILM)))
    few = world.posters(range(20, 23))
    world.hold_out(few)
    seen = [picture(OTHER, draw) for draw in range(12)]
    world.train("new", drawn_by(OTHER), seen)
    before, measured = world.judge(), fidelity()
    assert before["decision"] == "reject" and "lower than the champion's" in before["reason"]
    # Most of what it was trained on moves to the other folder, where it would be praised for it.
    world.put_in(seen[9:])
    world.hold_out([*few, *seen[:9]])
    assert set(world.stale()) == {"fidelity_scores"}
    row = world.judge()
    assert (row["decision"], row["reason"]) == (before["decision"], before["reason"])
    pd.testing.assert_series_equal(fidelity(), measured)


def test_a_checkpoint_whose_training_posters_are_not_all_there_is_held(world: World) -> None:
    world.train("good", drawn_by(FILM))
    gone = world.store.read_table("training_csv")["image"][3]
    world.store.path(gone, ".png").unlink()
    row = world.judge()
    assert row["decision"] == "hold"
    assert "1 of the posters that the checkpoint was trained on cannot be read" in row["reason"]
    assert "run the job `retrain`" in row["reason"]
    assert not world.checks()["few_images_are_copies"]
    # It is no excuse for the others.
    world.train("copy", memorised)
    assert world.judge()["decision"] == "reject"
    world.keep("tuned_generations", world.images("unknown", "dreambooth", drawn_by(FILM)))
    row = world.judge()
    assert row["decision"] == "hold"
    assert "which posters the checkpoint was trained on is not known" in row["reason"]


def test_without_holdout_posters_the_gate_says_what_to_do(world: World) -> None:
    # These smooth pictures are alike by their hashes.
    lenient = world.settings.gate.model_copy(update={"copy_limit": 1.0})
    world.settings = world.settings.model_copy(update={"gate": lenient})
    world.train("good", drawn_by(FILM))
    world.hold_out([])
    row = world.judge()
    assert row["decision"] == "hold"
    told = json.loads(read_decisions(world.deployment.warehouse)["numbers"].iloc[-1])["checks"]
    reasons = {check["name"]: check["reason"] for check in told if check["outcome"] == "open"}
    assert set(reasons) == {"copies", "fidelity"}
    assert "put film posters that are in no training set into the folder" in reasons["fidelity"]
    assert "materialize `tuned_generations`" not in row["reason"]


def test_judging_again_decides_nothing_new_and_a_promotion_makes_nothing_stale(
    served: World,
) -> None:
    first = served.store.read_table("champion").iloc[0]
    assert first["decision"] == "promote"
    assert served.stale() == {}
    pd.testing.assert_series_equal(served.judge(), first)
    assert len(read_decisions(served.deployment.warehouse)) == 1


def test_the_next_checkpoint_is_measured_against_the_champion(served: World) -> None:
    # What the first checkpoint draws lies in the store, as after a real run.
    own = served.store.read_table("tuned_generations")
    served.train("worse", memorised)
    assert set(served.stale()) == {"champion_generations", "fidelity_scores", "champion"}
    served.keep("tuned_generations", own)
    assert served.stale() == {}, "there and back again"


def test_nothing_is_decided_against_a_champion_of_before(served: World) -> None:
    # What "good" has to be compared with was not drawn: the base model is the champion of before.
    served.train("two", lambda p, s, n: picture(FILM, 3000 + 100 * p + 10 * s + int(n), share=0.5))
    with pytest.raises(GateError, match="compared with base, but the champion to beat is good"):
        served.judge("fidelity_scores", "champion")
    decisions = read_decisions(served.deployment.warehouse)
    assert decisions["checkpoint_id"].tolist() == ["good"]
    assert set(served.stale()) >= {"champion_generations", "champion"}


def test_a_later_checkpoint_is_held_against_the_base_model_as_well(served: World) -> None:
    served.keep("champion_generations", served.store.read_table("tuned_generations"))
    served.train("two", lambda p, s, n: picture(FILM, 3000 + 100 * p + 10 * s + int(n), share=0.5))
    served.judge("fidelity_scores", "champion")
    last = read_decisions(served.deployment.warehouse).iloc[-1]
    assert (last["checkpoint_id"], last["champion_before"]) == ("two", "good")
    told = {check["name"]: check for check in json.loads(last["numbers"])["checks"]}
    for name in ("CLIP-T", "diversity"):
        assert "the base model's" in told[f"{name} since base"]["reason"]
        assert told[f"{name} since base"]["value"] != told[name]["value"]


def test_a_pin_and_a_rollback_are_noticed_and_shown(served: World) -> None:
    served.decide(rollback)
    assert served.stale() == {"champion": "another checkpoint was chosen"}
    row = served.judge("champion")
    assert (row["checkpoint_id"], row["kind"], row["pinned"]) == ("base", "base", True)
    assert served.stale() == {}
    log = read_decisions(served.deployment.warehouse)
    assert log["decided_by"].tolist() == ["gate", "Ida Moss"]
    assert log["reason"].iloc[-1] == "it sells"
    served.decide(unpin)
    assert served.judge("champion")["checkpoint_id"] == "good"
    assert read_mirrored_decisions(served.store.root)["decision_id"].tolist() == (
        read_decisions(served.deployment.warehouse)["decision_id"].tolist()
    )


def test_a_pin_stands_after_the_warehouse_was_lost(served: World) -> None:
    served.decide(pin, "base")
    served.judge("champion")
    log = read_decisions(served.deployment.warehouse)
    served.deployment.warehouse_path.unlink()
    row = served.judge()
    assert (row["checkpoint_id"], row["pinned"]) == ("base", True)
    pd.testing.assert_frame_equal(read_decisions(served.deployment.warehouse), log)
    assert served.stale() == {}


@pytest.mark.slow  # what was decided is there again: core/test_evidence.py
def test_the_gate_goes_on_after_the_warehouse_was_lost(served: World) -> None:
    served.keep("champion_generations", served.store.read_table("tuned_generations"))
    served.train("two", incomplete)
    row = served.judge("fidelity_scores", "champion")
    assert (row["decision"], row["checkpoint_id"]) == ("hold", "good")
    log = read_decisions(served.deployment.warehouse)
    served.deployment.warehouse_path.unlink()
    pd.testing.assert_series_equal(served.judge("fidelity_scores", "champion"), row)
    pd.testing.assert_frame_equal(read_decisions(served.deployment.warehouse), log)


def test_decisions_that_cannot_be_read_are_waited_for_by_name(served: World) -> None:
    path = served.store.root / MIRROR
    told = path.read_text("utf-8")
    path.write_text(told[:-9])
    assert set(served.stale()) == {"champion_generations", "champion"}
    assert all(str(path) in reason for reason in served.stale().values())
    with pytest.raises(WarehouseError, match=MIRROR):
        served.judge("champion")
    path.write_text(told)
    assert served.stale() == {}


def test_other_weights_of_an_image_encoder_are_noticed(world: World, tmp_path: Path) -> None:
    encoder = build_tiny_clip(tmp_path / "encoder")
    asked = {"image_encoders": (ModelRef(id=str(encoder), revision=None),)}
    changed = {"evidence": world.settings.evidence.model_copy(update=asked)}
    world.settings = world.settings.model_copy(update=changed)
    world.train("good", drawn_by(FILM))
    world.judge()
    assert world.stale() == {}
    (encoder / "preprocessor_config.json").write_text('{"do_resize": false}')
    assert world.stale() == {"fidelity_scores": "its model changed"}
