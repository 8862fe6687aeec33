from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from posterpipe.core.dreambooth.saves import newest_save, pack, unpack, write_save
from posterpipe_tests.core.conftest import Disk, disk_is_full


def add(folder: Path, step: int, *, checkpoint_id: str = "mine", keep: int = 2) -> Path:
    return write_save(
        folder,
        step=step,
        checkpoint_id=checkpoint_id,
        tensors={"unet": {"w": torch.full((4,), float(step))}},
        state={"seconds": step * 1.5},
        keep=keep,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_save_comes_back(tmp_path: Path) -> None:
    add(tmp_path, 10)
    add(tmp_path, 20)
    save = newest_save(tmp_path, checkpoint_id="mine", log=print)
    assert save is not None
    assert save.step == 20 and save.state == {"seconds": 30}
    assert save.tensors("unet")["w"].tolist() == [20] * 4


def test_no_folder_means_no_save(tmp_path: Path) -> None:
    assert newest_save(tmp_path / "none", checkpoint_id="mine", log=print) is None


def test_old_saves_go_only_after_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        add(tmp_path, step)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]

    monkeypatch.setattr("posterpipe.core.dreambooth.saves.save_file", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        add(tmp_path, 40)
    monkeypatch.undo()
    save = newest_save(tmp_path, checkpoint_id="mine", log=print)
    assert save is not None and save.step == 30
    add(tmp_path, 40)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]


def test_a_save_survives_a_power_cut_before_older_ones_go(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, 10)
    removed: list[Path] = []

    def remove(folder: Path) -> None:
        assert not disk.unnamed, "the newer one would be lost with it"
        removed.append(folder)

    monkeypatch.setattr("posterpipe.core.dreambooth.saves.shutil.rmtree", remove)
    old, new = tmp_path / "step-00000010", add(tmp_path, 20, keep=1)
    assert disk.renamed == [old, new] and disk.half == []
    assert removed == [old]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "no manifest", "foreign"])
def test_a_bad_save_is_refused_by_name_and_the_one_before_it_taken(
    tmp_path: Path, damage: str
) -> None:
    add(tmp_path, 10)
    bad = add(tmp_path, 20, checkpoint_id="another" if damage == "foreign" else "mine")
    weights = bad / "unet.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "gone":
        weights.unlink()
    elif damage == "no manifest":
        (bad / "manifest.json").unlink()
    said: list[str] = []
    save = newest_save(tmp_path, checkpoint_id="mine", log=said.append)
    assert save is not None and save.step == 10
    assert len(said) == 1 and "step-00000020" in said[0]
    # The run goes on from 10 and saves again: the refused one makes room.
    add(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-00000015"]


def test_a_half_written_save_is_never_seen(tmp_path: Path) -> None:
    add(tmp_path, 10)
    abandoned = tmp_path / ".step-00000020.4242.tmp"
    abandoned.mkdir()
    (abandoned / "unet.safetensors").write_bytes(b"half")
    save = newest_save(tmp_path, checkpoint_id="mine", log=print)
    assert save is not None and save.step == 10
    add(tmp_path, 20)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize("eight_bit", [False, True])
def test_optimizer_states_survive_the_way_through_json_and_tensors(eight_bit: bool) -> None:
    def make() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 6400).reshape(80, 80))
        if eight_bit:
            from bitsandbytes.optim import AdamW8bit

            return parameter, AdamW8bit([{"params": [parameter]}], lr=1e-2)
        return parameter, torch.optim.AdamW([parameter], lr=1e-2, fused=True)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, n: int) -> None:
        parameter.grad = torch.sin(torch.arange(6400.0) * n).reshape(80, 80)
        optimizer.step()

    whole, optimizer = make()
    for n in range(6):
        step(whole, optimizer, n)

    first, optimizer = make()
    for n in range(3):
        step(first, optimizer, n)
    packed, tensors = pack(optimizer.state_dict())
    packed = json.loads(json.dumps(packed))
    tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
    second, optimizer = make()
    with torch.no_grad():
        second.copy_(first)
    optimizer.load_state_dict(unpack(packed, tensors))
    for n in range(3, 6):
        step(second, optimizer, n)
    assert torch.equal(whole, second)
