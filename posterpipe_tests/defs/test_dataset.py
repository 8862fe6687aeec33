"""From posters to training.csv as assets: a caption by a person touches its row and no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from posterpipe.definitions import build_defs
from posterpipe.defs.resources import Deployment
from posterpipe.defs.staleness import stale_assets
from posterpipe.settings import Settings, load_settings
from posterpipe_tests.core.tiny_blip import build_tiny_blip

STAGES = (
    "raw_posters",
    "holdout_posters",
    "human_captions",
    "resized_posters",
    "poster_captions",
    "training_csv",
)


class Dataset:
    """A deployment up to the training set, on an instance of its own."""

    def __init__(self, settings: Settings, instance: dg.DagsterInstance) -> None:
        self.settings = settings
        self.instance = instance

    def run(self, *names: str, **captioner: object) -> None:
        """Materialize the assets of these names with these settings of the captioner.

        Without their checks: three posters and a captioner that knows nothing pass few of them.
        """
        defs = self.defs(**captioner)
        result = dg.materialize(
            [asset for asset in defs.assets or [] if isinstance(asset, dg.AssetsDefinition)],
            selection=dg.AssetSelection.assets(*names).without_checks(),
            resources=defs.resources,
            instance=self.instance,
        )
        assert result.success

    def defs(self, **captioner: object) -> dg.Definitions:
        changed = self.settings.captioner.model_copy(update=captioner)
        return build_defs(self.settings.model_copy(update={"captioner": changed}))

    def stale(self, **captioner: object) -> set[str]:
        """Which of the stages do not match what they are made from."""
        specs = self.defs(**captioner).resolve_all_asset_specs()
        stale = stale_assets(specs, self.instance, Deployment(self.settings))
        return {key.to_user_string() for key in stale} & set(STAGES)

    def table(self, name: str) -> pd.DataFrame:
        return Deployment(self.settings).store.read_table(name)

    def metadata(self, name: str) -> dict[str, object]:
        record = self.instance.get_latest_materialization_event(dg.AssetKey(name))
        assert record is not None
        assert record.asset_materialization is not None
        entries = record.asset_materialization.metadata
        return {label: entry.value for label, entry in entries.items()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "landing").mkdir()
    for number in range(3):
        image = Image.new("RGB", (64, 96), (80 * number, 90, 200))
        ImageDraw.Draw(image).ellipse((8, 20, 56, 20 + 25 * (number + 1)), fill="white")
        image.save(folder / "landing" / f"poster {number}.png")
    settings = load_settings(
        "starter",
        landing=folder / "landing",
        captions=folder / "captions.csv",
        holdout=folder / "holdout",
        store=folder / "store",
        images={"width": 32, "height": 48},
        captioner={
            "model": {"id": str(build_tiny_blip(folder / "captioner"))},
            "max_new_tokens": 8,
            "precision": "fp32",
        },
    )
    (folder / "home").mkdir()
    with dg.DagsterInstance.ephemeral(tempdir=str(folder / "home")) as instance:
        dataset = Dataset(settings, instance)
        dataset.run(*STAGES)
        yield dataset


def test_without_captions_by_people_the_model_describes_all(dataset: Dataset) -> None:
    assert dataset.table("human_captions").empty
    assert set(dataset.table("poster_captions")["source"]) == {"model"}
    assert dataset.metadata("poster_captions")["human"] == 0
    assert dataset.stale() == set()


def test_a_caption_by_a_person_changes_one_row_of_training_csv(dataset: Dataset) -> None:
    before = dataset.table("training_csv")
    model = dataset.table("poster_captions")
    dataset.settings.captions.write_text("file_name,caption\nposter 1.png,by hand\n", "utf-8")
    try:
        dataset.run("human_captions")
        assert dataset.stale() == {"poster_captions"}
        dataset.run("poster_captions", "training_csv")
        captions, after = dataset.table("poster_captions"), dataset.table("training_csv")
        assert sorted(captions["source"]) == ["human", "model", "model"]
        assert sum(captions["caption"] != model["caption"]) == 1
        changed = before["caption"] != after["caption"]
        assert after.loc[changed, "caption"].tolist() == ["by hand"]
        assert after["file_name"].equals(before["file_name"])
        # Another captioner leaves it alone.
        dataset.run("poster_captions", max_new_tokens=2)
        again = dataset.table("poster_captions").set_index("poster_id")["caption"]
        human = captions.loc[captions["source"] == "human", "poster_id"].item()
        assert again[human] == "by hand"
        assert all(len(text.split()) <= 2 for text in again.drop(human))
    finally:
        dataset.settings.captions.unlink()
        dataset.run("human_captions", "poster_captions", "training_csv")
    assert dataset.table("training_csv").equals(before)


def test_the_ui_shows_captions_with_what_tells_them_apart(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[list[str], int]] = []

    def recorded(images: Sequence[tuple[object, str]], **options: Any) -> Image.Image:
        shown.append((sorted(label for _, label in images), options["label_lines"]))
        return Image.new("RGB", (8, 8))

    dataset.settings.captions.write_text(
        "file_name,caption\n"
        + "".join(f"poster {n}.png,a minimalist film poster of {n} owls\n" for n in range(3)),
        "utf-8",
    )
    try:
        with monkeypatch.context() as patch:
            patch.setattr("posterpipe.core.gallery.contact_sheet", recorded)
            dataset.run("human_captions", "poster_captions", "training_csv")
    finally:
        dataset.settings.captions.unlink()
        dataset.run("human_captions", "poster_captions", "training_csv")
    assert shown == [(["… 0 …", "… 1 …", "… 2 …"], 5)] * 2


def test_another_wording_makes_training_csv_stale_and_no_caption(dataset: Dataset) -> None:
    plain = dataset.table("training_csv")
    worded = {"template": "{trigger}, {caption}", "trigger": "our style"}
    assert dataset.stale(**worded) == {"training_csv"}
    dataset.run("training_csv", **worded)
    try:
        captions = dataset.table("training_csv")["caption"]
        assert captions.tolist() == [f"our style, {text}" for text in plain["caption"]]
        metadata = dataset.metadata("training_csv")
        assert metadata["template"] == worded["template"]
        assert metadata["trigger"] == worded["trigger"]
    finally:
        dataset.run("training_csv")


def test_what_was_lost_of_the_store_is_stale_and_comes_back(dataset: Dataset) -> None:
    store, lost = Deployment(dataset.settings).store, dataset.settings.store / "lost"
    lost.mkdir()
    version = store.table_version("human_captions")
    for asset, path in [
        ("raw_posters", store.path(dataset.table("raw_posters")["poster_id"][0])),
        ("resized_posters", store.path(dataset.table("resized_posters")["image"][0], ".png")),
        ("human_captions", store.root / "tables" / "human_captions" / f"{version}.parquet"),
        ("training_csv", Path(str(dataset.metadata("training_csv")["folder"]))),
    ]:
        path.rename(lost / path.name)
        assert dataset.stale() == {asset}
        dataset.run(asset)
        assert path.exists()
        assert dataset.stale() == set()


@pytest.mark.parametrize("asset", ["raw_posters", "human_captions"])
def test_a_table_that_was_damaged_is_stale_and_comes_back(dataset: Dataset, asset: str) -> None:
    folder = dataset.settings.store / "tables" / asset
    version = Deployment(dataset.settings).store.table_version(asset)
    for path in (folder / f"{version}.parquet", folder / "current.json"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert dataset.stale() == {asset}
        dataset.run(asset)
        assert path.read_bytes() == whole
        assert dataset.stale() == set()


def test_a_rejected_caption_is_shown_with_its_reason(dataset: Dataset) -> None:
    sidecar = Path(dataset.settings.landing) / "poster 9.txt"
    sidecar.write_text("a poster that is not there", "utf-8")
    try:
        dataset.run("human_captions")
        assert dataset.metadata("human_captions")["rejected"] == 1
    finally:
        sidecar.unlink()
        dataset.run("human_captions")
