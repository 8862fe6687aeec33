"""Finding models: what is missing is said in one sentence with the remedy."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from posterpipe.core import models
from posterpipe.core.models import (
    ModelMissing,
    fingerprint,
    give_memory_back,
    known_fingerprint,
    locate,
    revision_of,
    usable_precision,
    whole_fp32,
)
from posterpipe.settings import ModelRef
from posterpipe_tests.core.drawing import tf32_switches
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
        "The profile needs the model owner/name (revision abc) from the Hugging Face hub, and the "
        "hub cannot be reached: connect, or run `hf download owner/name` on a machine that is "
        "connected and copy its cache, or choose POSTERPIPE_PROFILE=starter"
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


def _given_back() -> float:
    """Bytes that the system has again, of 400 MB that are free in pieces between others."""
    import torch

    def held() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    block = torch.ones(8_000_000)
    del block  # glibc learns from it: blocks of less come from the heap from now on
    between = [(torch.ones(2_500_000), torch.ones(50_000)) for _ in range(40)]
    kept = [small for _, small in between]
    del between
    before = held()
    give_memory_back()
    assert len(kept) == 40
    return before - held()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system as Linux answers")
def test_memory_goes_back_to_the_system() -> None:
    # In a process of its own: what others have freed before would be counted as well.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        assert process.submit(_given_back).result() > 200e6


def test_whole_fp32_is_left_as_it_was_found_also_after_an_error_and_with_others_inside() -> None:
    before = tf32_switches()
    assert before == (True, False)
    first, second = whole_fp32(), whole_fp32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tf32_switches() == (False, False), "the second one is still inside"
    second.__exit__(None, None, None)
    assert tf32_switches() == before
    with pytest.raises(ZeroDivisionError), whole_fp32():
        assert tf32_switches() == (False, False)
        raise ZeroDivisionError
    assert tf32_switches() == before


def test_the_precision_is_one_that_the_device_is_good_at(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for has_amx, has_bf16, expected in (
        (True, True, ("bf16", "bf16")),
        (False, False, ("fp32", "fp16")),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda has=has_bf16, including_emulation=True: has
        )
        assert (usable_precision("auto", cpu), usable_precision("auto", gpu)) == expected
    assert usable_precision("auto", torch.device("mps")) == "fp32"
    assert usable_precision("fp16", cpu) == "fp32"
    assert usable_precision("fp16", gpu) == "fp16"
    assert usable_precision("bf16", cpu) == "bf16"
