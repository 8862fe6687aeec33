"""Finding models: what is missing is said in one sentence with the remedy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from posterpipe.core import models
from posterpipe.core.models import ModelMissing, fingerprint, known_fingerprint, locate, revision_of
from posterpipe.settings import ModelRef
from posterpipe_tests.models import HubCache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "captioner"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("a card")
    return tmp_path


def test_a_directory_is_itself(root: Path) -> None:
    expected = root / "models" / "captioner"
    assert locate(ModelRef(id="models/captioner"), root) == expected
    assert locate(ModelRef(id=str(expected)), Path("/nowhere")) == expected


@pytest.mark.parametrize("name", ["models/other", "data/models/starter/base", "/nowhere/at/all"])
def test_a_missing_directory_is_named_with_the_remedy(root: Path, name: str) -> None:
    with pytest.raises(ModelMissing, match=rf"{name} is not there: restore it") as caught:
        locate(ModelRef(id=name), root)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelMissing):
        fingerprint(ModelRef(id=name), root)


def test_a_directory_without_weights_is_not_complete(root: Path) -> None:
    (root / "models" / "captioner" / "model.safetensors").unlink()
    with pytest.raises(ModelMissing, match=r"is not complete .*safetensors"):
        locate(ModelRef(id="models/captioner"), root)


def test_a_pipeline_without_one_of_its_parts_is_not_complete(root: Path) -> None:
    base = root / "base"
    for part in ("unet", "vae", "text_encoder"):
        (base / part).mkdir(parents=True)
        (base / part / "model.safetensors").touch()
    index = '{"unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "text_encoder": ["t", "T"]}'
    (base / "model_index.json").write_text(index)
    assert locate(ModelRef(id="base"), root) == base
    (base / "vae" / "model.safetensors").unlink()
    with pytest.raises(ModelMissing, match="not complete"):
        locate(ModelRef(id="base"), root)


def test_a_hub_model_without_network_gives_one_sentence(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
    monkeypatch.setattr(models, "_hub_answers", lambda: False)
    with pytest.raises(ModelMissing) as caught:
        locate(ModelRef(id="owner/name", revision="abc"), root)
    assert str(caught.value) == (
        "The model owner/name (revision abc) is no folder here, and the Hugging Face hub, which "
        "may have it, cannot be reached: connect, or run `hf download owner/name` on a machine "
        "that is connected and copy its cache, or choose POSTERPIPE_PROFILE=starter"
    )


def test_offline_mode_counts_as_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not models._hub_answers()


def test_a_hub_that_does_not_answer_counts_as_not_reachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not models._hub_answers()


FIRST, SECOND = "0123456789abcdef" * 2 + "01234567", "89abcdef" * 5


@pytest.fixture
def hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """A cache of the hub that holds nothing yet; the hub itself does not answer."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
    monkeypatch.setattr(models, "_hub_answers", lambda: False)
    return HubCache(root / "cache")


def test_a_hub_model_in_the_cache_needs_no_network(root: Path, hub: HubCache) -> None:
    snapshot = hub.add("owner/name", FIRST, root / "models" / "captioner")
    assert locate(ModelRef(id="owner/name", revision="main"), root) == snapshot
    # An interrupted download is no model.
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelMissing):
        locate(ModelRef(id="owner/name", revision="main"), root)


def test_of_a_hub_model_its_card_is_fetched_but_not_needed(
    root: Path, hub: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not in the cache")
        asked.update(options)
        return str(hub.add(name, FIRST, root / "models" / "captioner"))

    ref = ModelRef(id="owner/name", revision="main")
    with monkeypatch.context() as online:
        online.setattr(models, "_hub_answers", lambda: True)
        online.setattr("huggingface_hub.snapshot_download", download)
        snapshot = locate(ref, root)
    files = ["README.md", "unet/README.md", "unet/model.safetensors", "model.ckpt"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == ["README.md", "unet/model.safetensors"]
    before = fingerprint(ref, root)
    (snapshot / "README.md").unlink()  # as in a cache that was filled before
    assert locate(ref, root) == snapshot and fingerprint(ref, root) == before


def test_the_fingerprint_follows_weights_and_configuration_only(root: Path) -> None:
    ref = ModelRef(id="models/captioner")
    folder = root / "models" / "captioner"
    first = fingerprint(ref, root)
    assert len(first) == 12
    (folder / "README.md").write_text("another card")
    os.utime(folder / "config.json", (1, 1))
    assert fingerprint(ref, root) == first
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    second = fingerprint(ref, root)
    (folder / "config.json").write_text('{"a": 1}')
    assert len({first, second, fingerprint(ref, root)}) == 3
    # It is the content that counts, not the place.
    shutil.copytree(folder, root / "elsewhere")
    assert fingerprint(ModelRef(id="elsewhere"), root) == fingerprint(ref, root)


def test_a_hub_model_pinned_by_commit_is_known_before_it_is_downloaded(
    root: Path, hub: HubCache
) -> None:
    refs = [ModelRef(id="owner/name", revision=commit) for commit in (FIRST, SECOND)]
    assert fingerprint(refs[0], root) != fingerprint(refs[1], root)
    assert known_fingerprint(refs[0], root) == fingerprint(refs[0], root)
    assert revision_of(refs[0], root) == FIRST


@pytest.mark.parametrize("revision", ["main", None])
def test_a_branch_that_moved_is_another_model(
    root: Path, hub: HubCache, revision: str | None
) -> None:
    ref = ModelRef(id="owner/name", revision=revision)
    hub.add("owner/name", FIRST, root / "models" / "captioner")
    before = fingerprint(ref, root)
    assert revision_of(ref, root) == FIRST
    hub.add("owner/name", SECOND, root / "models" / "captioner")
    assert fingerprint(ref, root) != before
    # Whoever pins what is there goes on with the same model.
    assert fingerprint(ModelRef(id="owner/name", revision=SECOND), root) == fingerprint(ref, root)


def test_a_branch_that_is_not_here_has_no_fingerprint(root: Path, hub: HubCache) -> None:
    ref = ModelRef(id="owner/name", revision="main")
    assert known_fingerprint(ref, root) is None
    with pytest.raises(ModelMissing, match=r"owner/name \(revision main\) .* cannot be reached"):
        fingerprint(ref, root)
    # Half a snapshot would be downloaded once more, and the branch may have moved by then.
    snapshot = hub.add("owner/name", FIRST, root / "models" / "captioner")
    (snapshot / "model.safetensors").unlink()
    assert known_fingerprint(ref, root) is None
