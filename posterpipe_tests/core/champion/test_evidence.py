"""All metrics together into a warehouse, and the gate on what they say, with tiny encoders."""

from __future__ import annotations

import datetime as dt
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterpipe.core.champion.decisions import (
    DECISION_COLUMNS,
    GATE,
    MIRROR,
    GateError,
    champion_of,
    mirror_decisions,
    pin,
    read_decisions,
    read_mirrored_decisions,
    write_decisions,
)
from posterpipe.core.champion.evidence import (
    EVIDENCE_COLUMNS,
    MeasuredEvidence,
    held_out,
    judge,
    measure,
    posters_of,
)
from posterpipe.core.metrics.base import record_scores, score_rows
from posterpipe.core.metrics.fidelity import Posters, altered
from posterpipe.core.metrics.legibility import legibility_metrics
from posterpipe.core.metrics.titles_read import (
    record_readings,
    record_titles,
    record_unknown_titles,
)
from posterpipe.core.posters.arrivals import holdout_entries
from posterpipe.core.posters.landing import scan_holdout
from posterpipe.core.posters.listing import HOLDOUT, Folder
from posterpipe.core.progress import NoProgress
from posterpipe.core.quality import copied_posters
from posterpipe.core.store import Store, table_version
from posterpipe.core.warehouse.database import Warehouse, WarehouseError
from posterpipe.settings import ModelRef, Settings, load_settings
from posterpipe_tests.core.metrics.tiny import (
    build_tiny_clip,
    build_tiny_dino,
    generations,
    posters,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    root = tmp_path_factory.mktemp("root")
    build_tiny_clip(root / "models" / "clip")
    return load_settings(
        "starter",
        root=root,
        scorer={"model": {"id": "models/clip"}},
        evidence={"pickscore": {"id": "models/clip"}},
        images={"width": 64, "height": 96},
    )


@pytest.fixture
def warehouse(store: Store) -> Warehouse:
    return Warehouse(store.root / "scores.duckdb", busy_seconds=5)


def pictures(count: int, seed: int) -> list[Image.Image | None]:
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (9, 6, 3), dtype=np.uint8)).resize((64, 96))
        for _ in range(count)
    ]


def measured(
    store: Store, warehouse: Warehouse, table: pd.DataFrame, settings: Settings, seen: Posters
) -> MeasuredEvidence:
    holdout = posters(store, "holdout", [i for i in pictures(5, 1) if i])
    return measure(
        store, warehouse, table, {"tuned": seen}, holdout, settings, NoProgress(),
        challenger="tuned", run_id="run",
    )  # fmt: skip


def test_every_metric_has_a_row_for_every_image(
    store: Store, warehouse: Warehouse, settings: Settings
) -> None:
    seen = posters(store, "training", [i for i in pictures(6, 2) if i])
    table = generations(store, pictures(4, 3), statuses=["ok", "ok", "blocked", "ok"])
    evidence = measured(store, warehouse, table, settings, seen)
    assert list(evidence.table.columns) == list(EVIDENCE_COLUMNS)
    assert [metric.name for metric in evidence.metrics] == [
        "CLIP-T", "CLIP-T", "CLIP-T specific", "CLIP-T control", "CLIP-T rank",
        "CLIP-I holdout", "CLIP-I training", "CLIP-I overfit gap",
        "CLIP-I nearest training poster", "perceptual hash distance", "diversity", "PickScore",
    ]  # fmt: skip
    assert (evidence.table.groupby("metric_id").size() == 4).all()
    roles = evidence.table[evidence.table["role"] != ""].groupby("role")["metric"].first()
    assert roles.to_dict() == {
        "clip": "CLIP-T", "fidelity": "CLIP-I holdout", "diversity": "diversity",
        "preference": "PickScore", "copies": "CLIP-I nearest training poster",
        "specific": "CLIP-T specific", "control": "CLIP-T control", "rank": "CLIP-T rank",
    }  # fmt: skip
    copies = evidence.table[evidence.table["role"] == "copies"]
    assert copies.nearest_poster.isin([*seen.files, ""]).all()
    assert copies.copied.notna().tolist() == [True, True, False, True]
    thresholds = evidence.copy_thresholds(5)  # as many holdout posters as `measured` has
    assert thresholds["encoder"].tolist() == list(evidence.calibrations)
    assert (thresholds["holdout_posters"] + thresholds["left_out"]).eq(5).all()
    with warehouse.read() as connection:
        counts = connection.execute(
            "SELECT count(*), count(value), count(DISTINCT metric_id) FROM fct_score"
        ).fetchall()
        described = connection.execute("SELECT count(*) FROM dim_metric").fetchall()
    # One image of two prompts is blocked: its sibling has nothing to differ from.
    assert counts == [(48, 12 * 3 - 1, 12)] and described == [(12,)]


def test_each_checkpoint_is_held_against_what_it_was_trained_on(
    store: Store, warehouse: Warehouse, settings: Settings
) -> None:
    before, now, new = (
        [i for i in pictures(4, seed) if i] for seed in (20, 21, 22)
    )  # one poster of each training set is held out by now
    trained = {
        "old": posters(store, "training", before), "new": posters(store, "training", now),
    }  # fmt: skip
    tables = {
        name: generations(store, pictures(4, seed), variant=variant, checkpoint=name)
        for name, variant, seed in (("base", "sd", 3), ("new", "dreambooth", 4))
    }
    tables["old"] = generations(
        store, [*before[:2], *now[:2]], variant="dreambooth", checkpoint="old"
    )
    held = posters(store, "holdout", [before[0], now[0], *new])
    evidence = measure(
        store, warehouse, pd.concat(tables.values(), ignore_index=True), trained, held, settings,
        NoProgress(), challenger="new", run_id="run",
    )  # fmt: skip
    table = evidence.table
    copies = table[table["role"] == "copies"].set_index("checkpoint_id")
    for name, of in (("base", "new"), ("new", "new"), ("old", "old")):
        own = copies.loc[name]
        assert own["nearest_poster"].isin(trained[of].files).all()
        assert own["metric_id"].str.startswith(f"nearest.training.{trained[of].digest}.").all()
    # What another checkpoint was trained on is no poster of its own.
    assert copies[copies.index == "old"]["copied"].tolist() == [True, True, False, False]
    (same,) = table.loc[table["role"] == "fidelity", "metric_id"].unique()
    unseen = posters(store, "holdout", new)
    assert same.startswith(f"similarity.holdout.{unseen.digest}.")
    assert (table[table["role"] == "fidelity"].groupby("checkpoint_id").size() == 4).all()
    # Reports are about the base model and the challenger.
    with warehouse.read() as connection:
        used = set(connection.sql("SELECT metric_id FROM current_metric").df()["metric_id"])
        described = set(connection.sql("SELECT metric_id FROM dim_metric").df()["metric_id"])
    kinds = ["nearest", "overfit_gap", "phash", "similarity"]
    assert sorted(name.partition(".")[0] for name in described - used) == kinds


def test_a_lost_training_poster_is_counted_beside_a_champion_that_was_trained_on_the_others(
    store: Store, warehouse: Warehouse, settings: Settings
) -> None:
    seen = posters(store, "training", [i for i in pictures(4, 25) if i])
    lost, *kept = seen.files
    trained = {"new": seen, "old": Posters("training", {key: seen.files[key] for key in kept})}
    seen.files[lost].unlink()
    tables = [
        generations(store, pictures(2, seed), variant="dreambooth", checkpoint=name)
        for seed, name in enumerate(trained)
    ]
    evidence = measure(
        store, warehouse, pd.concat(tables, ignore_index=True), trained,
        posters(store, "holdout", [i for i in pictures(3, 26) if i]), settings, NoProgress(),
        challenger="new", run_id="run",
    )  # fmt: skip
    copies = evidence.table[evidence.table["role"] == "copies"]
    assert copies.loc[copies["checkpoint_id"] == "new", "lost_posters"].tolist() == [1, 1]


def test_of_two_encoders_the_first_says_what_is_a_copy(
    store: Store, warehouse: Warehouse, settings: Settings
) -> None:
    build_tiny_dino(settings.root / "models" / "dino", version=2)
    encoders = [ModelRef(id=f"models/{name}", revision=None) for name in ("clip", "dino")]
    # Every other new poster gives an alarm, so that the two often disagree.
    often = {"image_encoders": tuple(encoders), "copy_alarm": 0.49}
    two = settings.model_copy(update={"evidence": settings.evidence.model_copy(update=often)})
    seen = posters(store, "training", [i for i in pictures(6, 2) if i])
    evidence = measured(store, warehouse, generations(store, pictures(16, 3)), two, seen)
    copies = evidence.table[evidence.table["role"] == "copies"].set_index("generation_key")
    by_encoder = evidence.nearest.set_index(["metric_id", "generation_key"])
    (first,) = copies["metric_id"].unique()
    (second,) = set(evidence.nearest["metric_id"]) - {first}
    own, other = (by_encoder.loc[name].loc[copies.index] for name in (first, second))
    assert "CLIP-I" in set(copies["metric"]).pop()
    assert copies["copied"].tolist() == own["copied"].tolist() != other["copied"].tolist()
    thresholds = (copies["copy_threshold"], own["similarity_threshold"])
    assert thresholds[0].tolist() == thresholds[1].tolist()
    assert not thresholds[0].isin(other["similarity_threshold"]).any()


def test_a_copy_by_its_hash_names_the_poster_with_that_hash(
    store: Store, warehouse: Warehouse, settings: Settings
) -> None:
    images = [i for i in pictures(8, 2) if i]
    seen = posters(store, "training", images)
    # Without its colours a poster keeps its hash, and is no nearer to itself than to others.
    drawn = [*images[:2], *(image.convert("L").convert("RGB") for image in images), None]
    table = measured(store, warehouse, generations(store, drawn), settings, seen).table
    copies = table[table["role"] == "copies"].reset_index(drop=True)
    assert copies["copied_by"].tolist()[:2] == ["cosine"] * 2
    by_hash = copies[copies["copied_by"] == "hash"]
    assert (by_hash["copied_poster"] != by_hash["nearest_poster"]).any()
    expected = [*list(seen.files)[:2], *seen.files, ""]
    told = [key if by else "" for key, by in zip(expected, copies["copied_by"], strict=True)]
    assert copies["copied_poster"].tolist() == told
    offenders = copied_posters(table.assign(variant="dreambooth"), 0.05).offenders
    assert offenders["copied_poster"].tolist() == [key for key in told if key]


def test_measuring_again_changes_nothing(
    store: Store, warehouse: Warehouse, settings: Settings
) -> None:
    seen = posters(store, "training", [i for i in pictures(6, 2) if i])
    table = generations(store, pictures(2, 3))
    first = measured(store, warehouse, table, settings, seen)
    second = measured(store, warehouse, table, settings, seen)
    assert table_version(first.table) == table_version(second.table)
    with warehouse.read() as connection:
        assert connection.execute("SELECT count(*) FROM fct_score").fetchall() == [(18,)]


def test_a_checkpoint_that_draws_its_training_posters_is_rejected(
    store: Store, warehouse: Warehouse, settings: Settings
) -> None:
    seen_images = pictures(8, 2)
    seen = posters(store, "training", [i for i in seen_images if i])
    base = generations(store, pictures(8, 4))
    copied = generations(store, seen_images, variant="dreambooth", checkpoint="tuned")
    table = pd.concat([base, copied], ignore_index=True)
    evidence = measured(store, warehouse, table, settings, seen)
    assert read_decisions(Warehouse(store.root / "nothing.duckdb")).empty
    for _ in range(2):  # the same decision twice is one row
        decision = judge(
            warehouse, table, evidence.table, challenger="tuned", champion="base",
            base_model="base", settings=settings.gate, run_id="run",
        )  # fmt: skip
    assert decision.verdict == "reject" and "copies: 8 of 8 images" in decision.reason
    decisions = read_decisions(warehouse)
    assert decisions.decision.tolist() == ["reject"]
    assert champion_of(decisions, "base") == "base"
    pd.testing.assert_frame_equal(
        read_mirrored_decisions(store.root), decisions, check_dtype=False, check_column_type=False
    )


def test_with_two_holdout_posters_the_gate_does_not_say_that_nothing_is_copied(
    store: Store, warehouse: Warehouse, settings: Settings
) -> None:
    seen = posters(store, "training", [i for i in pictures(8, 2) if i])
    tuned = generations(store, pictures(8, 4), variant="dreambooth", checkpoint="tuned")
    table = pd.concat([generations(store, pictures(8, 3)), tuned], ignore_index=True)
    held = posters(store, "holdout", [i for i in pictures(2, 1) if i])
    evidence = measure(
        store, warehouse, table, {"tuned": seen}, held, settings, NoProgress(),
        challenger="tuned", run_id="run",
    ).table  # fmt: skip
    # A table of before there was a threshold is not taken for a calibrated one either.
    for known in (evidence, evidence.drop(columns="copy_threshold")):
        decision = judge(
            warehouse, table, known, challenger="tuned", champion="base", base_model="base",
            settings=settings.gate, run_id="run",
        )  # fmt: skip
        assert "copies: 0 of 8 images equal a training poster" in decision.reason
        finding = copied_posters(known, 0.05)
        assert not finding.passed and "how near is too near is not known" in finding.summary
        assert finding.expected == "at most 0.05, by a threshold from the holdout posters"
        assert finding.actual == "0, without a threshold"
    # With a threshold that copies do not reach, none found says no more.
    finding = copied_posters(evidence.assign(copy_threshold=0.999, copy_sensitivity=0.2), 0.05)
    assert not finding.passed and "only 20% would be found" in finding.summary
    assert copied_posters(evidence.assign(copy_threshold=0.9, copy_sensitivity=0.6), 0.05).passed
    # Of the checkpoint that is judged, whatever the bound of another one finds.
    by_challenger = evidence["variant"].str.startswith("dreambooth")
    mixed = evidence.assign(
        copy_threshold=0.9, copy_sensitivity=by_challenger.map({True: 0.2, False: 0.9})
    )
    assert not copied_posters(mixed, 0.05).passed


def test_without_holdout_posters_near_hashes_do_not_reject(
    store: Store, warehouse: Warehouse, settings: Settings
) -> None:
    images = [i for i in pictures(8, 20) if i]
    seen = posters(store, "training", images)
    alike = [altered(image).convert("RGB") for image in images]
    tuned = generations(store, alike, variant="dreambooth", checkpoint="tuned")
    table = pd.concat([generations(store, pictures(8, 3)), tuned], ignore_index=True)
    evidence = measure(
        store, warehouse, table, {"tuned": seen}, posters(store, "holdout", []), settings,
        NoProgress(), challenger="tuned", run_id="run",
    ).table  # fmt: skip
    own = evidence[(evidence["role"] == "copies") & (evidence["checkpoint_id"] == "tuned")]
    unsure = int(own["copy_unsure"].sum())
    assert unsure >= 4 and own.loc[own["copied"], "copied_by"].isin(["hash"]).all()
    own = own[~own["copied"]]
    evidence = evidence[
        evidence["generation_key"].isin([*own["generation_key"], *table[:8].iloc[:, 0]])
    ]
    decision = judge(
        warehouse, table, evidence, challenger="tuned", champion="base", base_model="base",
        settings=settings.gate, run_id="run",
    )  # fmt: skip
    assert decision.verdict == "hold" and decision.evidence.unsure == unsure
    told = f"{unsure} more may be copies by their perceptual hash"
    assert told in decision.reason
    finding = copied_posters(evidence, 0.05)
    assert (
        not finding.passed and told in finding.summary and "may be copies" in str(finding.expected)
    )
    # Where similarity is calibrated, what is left is how many posters the hash takes.
    finding = copied_posters(evidence.assign(copy_threshold=0.9, copy_sensitivity=0.6), 0.05)
    assert not finding.passed and "12 or more in all" in finding.remedy


def test_decisions_are_told_while_the_warehouse_is_locked(
    store: Store, warehouse: Warehouse
) -> None:
    assert read_mirrored_decisions(store.root).empty
    now = dt.datetime(2026, 5, 4, 3, 2, 1, 123456)
    row = pin(
        read_mirrored_decisions(store.root),
        "base",
        "base",
        who="Ida",
        why="a 'fair'",
        decided_at=now,
    )
    write_decisions(warehouse, lambda *_: row)
    with warehouse.write():
        told = read_mirrored_decisions(store.root)
    assert champion_of(told, "base") == "base"
    assert told[["decided_at", "decided_by", "reason"]].to_numpy().tolist() == [
        [pd.Timestamp(now), "Ida", "a 'fair'"]
    ]
    # What a kill between the two lost is told again.
    (store.root / MIRROR).unlink()
    assert read_mirrored_decisions(store.root).empty
    mirror_decisions(warehouse)
    assert (
        read_mirrored_decisions(store.root)["decision_id"].tolist() == row["decision_id"].tolist()
    )


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"{}", b"null", b"7", b"\xff", b'[{"decision_id": "a"}]', b"[[1]]"]
)
def test_decisions_that_cannot_be_read_are_said_to_be_so_and_are_not_written_over(
    warehouse: Warehouse, damage: bytes
) -> None:
    write_decisions(warehouse, lambda _, now: decision("hold", "a", now))
    path = warehouse.path.parent / MIRROR
    path.write_bytes(damage)
    for use in (
        lambda: read_mirrored_decisions(path.parent),
        lambda: read_decisions(warehouse),
        lambda: mirror_decisions(warehouse),
        lambda: write_decisions(warehouse, lambda _, now: decision("reject", "a", now)),
    ):
        with pytest.raises(WarehouseError, match=rf"{MIRROR}: .* cannot be read .* from a backup"):
            use()
    assert path.read_bytes() == damage
    path.unlink()
    assert mirror_decisions(warehouse)["decision"].tolist() == ["hold"]
    assert read_mirrored_decisions(path.parent)["decision"].tolist() == ["hold"]


def decision(verdict: str, checkpoint: str, now: dt.datetime, by: str = GATE) -> pd.DataFrame:
    row = {
        "decision_id": f"{checkpoint} {verdict} {now}", "decided_at": now, "run_id": "run",
        "checkpoint_id": checkpoint, "champion_before": "base", "decision": verdict,
        "reason": "made up", "numbers": "{}", "decided_by": by, "base_model": "base",
    }  # fmt: skip
    return pd.DataFrame([row], columns=list(DECISION_COLUMNS))


def test_of_two_who_decide_at_once_the_second_knows_of_the_first(warehouse: Warehouse) -> None:
    write_decisions(warehouse, lambda _, now: decision("hold", "a", now))

    def rejects() -> None:
        write_decisions(warehouse, lambda _, now: decision("reject", "a", now))

    gate = threading.Thread(target=rejects)

    def pins(decisions: pd.DataFrame, now: dt.datetime) -> pd.DataFrame:
        gate.start()
        gate.join(0.3)
        assert gate.is_alive(), "the gate decided between reading and writing of the pin"
        return pin(decisions, "a", "base", who="Ida", why="I like it", decided_at=now)

    write_decisions(warehouse, pins)
    gate.join()
    decisions = read_decisions(warehouse)
    assert decisions["decided_by"].tolist() == [GATE, "Ida", GATE]
    assert champion_of(decisions, "base") == "base"
    assert read_mirrored_decisions(warehouse.path.parent)["decision_id"].tolist() == (
        decisions["decision_id"].tolist()
    )
    with pytest.raises(GateError, match="never served"):
        write_decisions(
            warehouse,
            lambda known, now: pin(known, "a", "base", who="Ida", why="still", decided_at=now),
        )


def test_decisions_come_one_after_the_other_whatever_the_clock_says(warehouse: Warehouse) -> None:
    future = dt.datetime(2199, 1, 1)
    write_decisions(warehouse, lambda *_: decision("promote", "a", future))
    write_decisions(warehouse, lambda _, now: decision("reject", "a", now))
    decisions = read_decisions(warehouse)
    assert decisions["decision"].tolist() == ["promote", "reject"]
    assert decisions["decided_at"].is_monotonic_increasing and decisions["decided_at"].is_unique


@pytest.mark.parametrize("restored", [False, True])
def test_decisions_survive_a_warehouse_that_is_lost_or_put_back(
    warehouse: Warehouse, tmp_path: Path, restored: bool
) -> None:
    write_decisions(warehouse, lambda _, now: decision("promote", "a", now))
    copy = tmp_path / "copy.duckdb"
    shutil.copyfile(warehouse.path, copy)

    def lose() -> None:
        warehouse.path.unlink()
        if restored:
            shutil.copyfile(copy, warehouse.path)

    write_decisions(warehouse, lambda _, now: decision("hold", "b", now))
    write_decisions(
        warehouse,
        lambda known, now: pin(known, "base", "base", who="Ida", why="a 'fair'", decided_at=now),
    )
    before = read_decisions(warehouse)
    lose()
    pd.testing.assert_frame_equal(
        read_decisions(warehouse), before, check_dtype=False, check_column_type=False
    )
    seen = []

    def nothing_new(decisions: pd.DataFrame, now: dt.datetime) -> pd.DataFrame:
        seen.append(decisions)
        return decisions.iloc[:0]

    write_decisions(warehouse, nothing_new)
    pd.testing.assert_frame_equal(seen[0], before)
    lose()
    pd.testing.assert_frame_equal(mirror_decisions(warehouse), before)
    (warehouse.path.parent / MIRROR).unlink()
    pd.testing.assert_frame_equal(read_decisions(warehouse), before)


def test_holdout_posters_are_resized_like_those_trained_on(
    store: Store, settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "held"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(3):
        values = rng.integers(0, 256, (300, 200, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    table = scan_holdout(
        Folder(folder, HOLDOUT), settings.images, store, entries=holdout_entries(folder)
    )
    shutil.rmtree(folder)  # as where it is not mounted: the table tells which posters are meant
    found = held_out(store, table, settings, NoProgress())
    assert found.name == "holdout" and len(found.files) == 3
    for path in found.files.values():
        with Image.open(path) as image:
            assert image.size == (64, 96)
    nothing = scan_holdout(
        Folder(tmp_path / "nowhere", HOLDOUT),
        settings.images,
        store,
        entries=holdout_entries(tmp_path / "nowhere"),
    )
    assert held_out(store, nothing, settings, NoProgress()).files == {}


def test_a_set_of_posters_names_each_image_once(store: Store) -> None:
    table = pd.DataFrame({"image": ["a", "b", "b", ""], "status": ["ok", "ok", "ok", "failed"]})
    assert list(posters_of(store, "training", table).files) == ["a", "b"]


def test_what_is_known_of_a_title_goes_with_it_where_an_image_is_lettered_no_more(
    store: Store, warehouse: Warehouse
) -> None:
    table = generations(store, pictures(3, 1), titles=["Star", "Moon", "Sun"])
    keys = table["generation_key"].tolist()
    titled = table.assign(style="bold", cap_height=9, contrast=5.0, scrim=False, covered=0.0)
    read = table[["generation_key", "title"]].assign(read="STAR", distance=0.0, exact=True)

    def known() -> list[set[str]]:
        with warehouse.read() as connection:
            tables = [connection.sql(f"FROM {name}").df() for name in ("fct_title", "fct_reading")]
        return [set(table["generation_key"]) for table in tables]

    record_titles(warehouse, titled, keys, run_id="run")
    record_readings(warehouse, read, "set", run_id="run")
    assert known() == [set(keys)] * 2
    # The image of another checkpoint, which is not looked at now, keeps its title.
    record_titles(warehouse, titled[:1], keys[:2], run_id="run")
    assert known() == [{keys[0], keys[2]}] * 2


def test_scores_of_titles_that_the_ocr_cannot_read_are_taken_back(
    store: Store, warehouse: Warehouse
) -> None:
    """An older posterpipe gave them numbers under the same metric."""
    table = generations(store, pictures(2, 1), titles=["Star", "기생충"])
    metrics = legibility_metrics("drawn")
    scores = pd.concat(
        [
            score_rows(table, metric.metric_id, dict.fromkeys(table["generation_key"], 0.0), {})
            for metric in metrics
        ]
    )
    read = table[["generation_key", "title"]].assign(read="STAR", distance=0.0, exact=True)
    record_scores(warehouse, table, metrics, scores, run_id="run", step="legibility_scores drawn")
    record_readings(warehouse, read, "drawn", run_id="run")
    record_unknown_titles(warehouse, metrics, {"기생충": "not its letters"})
    known, beyond = table["generation_key"]
    for metric in metrics:
        held = warehouse.scores(metric.metric_id, [known, beyond]).set_index("generation_key")
        assert held["status"].to_dict() == {known: "ok", beyond: "blocked"}
        assert held.loc[beyond, "reason"] == "not its letters"
        assert np.isnan(held.loc[beyond, "value"])
    with warehouse.read() as connection:
        assert connection.sql("SELECT generation_key FROM fct_reading").fetchall() == [(known,)]
