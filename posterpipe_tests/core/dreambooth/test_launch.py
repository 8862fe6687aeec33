"""How training is started: as the caller says, whatever accelerate finds in the user's home."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config import config_args

from posterpipe.core.dreambooth.launch import launch_command, launch_environment

AT_HOME = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
deepspeed_config: {{}}
gpu_ids: "3,4"
mixed_precision: bf16
num_machines: 2
num_processes: 4
machine_rank: 1
main_process_ip: 10.0.0.1
main_process_port: 29999
use_cpu: false
debug: true
"""


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MULTI_GPU", "MEGATRON_LM", "NO"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_config_file_of_accelerate_in_the_users_home_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, processes: int
) -> None:
    command = launch_command(tmp_path / "run.toml", processes=processes)
    place = command.index("accelerate.commands.launch") + 1
    parser = launch.launch_command_parser()

    def understood(home: Path) -> dict[str, object]:
        for module in (launch, config_args):
            monkeypatch.setattr(module, "default_config_file", str(home))
        arguments, _, _ = launch._validate_launch_command(parser.parse_args(command[place:]))
        return vars(arguments)

    plain = understood(tmp_path / "nothing.yaml")
    assert not plain["use_fsdp"] and not plain["use_deepspeed"]
    assert plain["multi_gpu"] == (processes == 2) and plain["num_processes"] == processes
    assert plain["gpu_ids"] == "all" and plain["mixed_precision"] == "no"
    at_home = tmp_path / "default_config.yaml"
    at_home.write_text(AT_HOME.format(kind=kind))
    assert understood(at_home) == plain


def test_the_launcher_waits_for_a_save_unless_someone_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    monkeypatch.delenv(name, raising=False)
    assert int(launch_environment()[name]) >= 600
    monkeypatch.setenv(name, "7")
    assert launch_environment() == {name: "7"}
