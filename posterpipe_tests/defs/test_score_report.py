"""The asset `score_report`: what it writes, and how Dagster leads to it."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from posterpipe.defs.resources import Deployment
from posterpipe.defs.score_report import score_report
from posterpipe.settings import load_settings
from posterpipe_tests.report_world import copy_of


@pytest.fixture
def deployment(tmp_path: Path, published_world: Path) -> Deployment:
    store = copy_of(published_world, tmp_path / "store")
    return Deployment(load_settings(store=store))


def materialized(deployment: Deployment) -> dg.AssetMaterialization:
    result = dg.materialize([score_report], resources={"deployment": deployment})
    (event,) = result.asset_materializations_for_node("score_report")
    return event


def test_the_ui_leads_to_the_report(deployment: Deployment) -> None:
    metadata = materialized(deployment).metadata
    index = deployment.report_path
    assert index.is_file()
    assert metadata["path"].value == str(index)
    assert metadata["open"].value == index.resolve().as_uri()
    assert "Fine-tuning" in str(metadata["says"].value)
    images = metadata["images"].value
    assert isinstance(images, int) and images > 100


def test_the_link_goes_to_the_web_server_where_one_is_configured(deployment: Deployment) -> None:
    settings = deployment.settings.model_copy(update={"public_url": "http://127.0.0.1:8000/"})
    metadata = materialized(Deployment(settings)).metadata
    assert metadata["open"].value == "http://127.0.0.1:8000/report/index.html"


def test_the_same_scores_give_the_same_data_version(deployment: Deployment) -> None:
    versions = {(materialized(deployment).tags or {})["dagster/data_version"] for _ in range(2)}
    assert len(versions) == 1


def test_nothing_published_is_an_error_that_says_what_to_do(deployment: Deployment) -> None:
    deployment.published_path.unlink()
    with pytest.raises(Exception, match="published_scores"):
        materialized(deployment)
