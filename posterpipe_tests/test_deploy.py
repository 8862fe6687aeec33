"""The files of `deploy/systemd`: what they start is there, and they fit each other and the code."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from dagster._cli import create_dagster_cli
from dagster._core.instance.config import dagster_instance_config
from dagster._daemon.cli import create_dagster_daemon_cli
from dagster_webserver.cli import create_dagster_webserver_cli

from posterpipe.cli import app
from posterpipe.core.dreambooth.launch import STOPPING_SECONDS
from posterpipe.defs.launcher import _HERE
from posterpipe.settings import default_root, load_settings
from posterpipe_tests.test_docs import blocks

ROOT = default_root()
FOLDER = ROOT / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
INSTALLED = "/opt/posterpipe/.venv/bin/"
COMMANDS = {
    "dagster": create_dagster_cli(),
    "dagster-daemon": create_dagster_daemon_cli(),
    "dagster-webserver": create_dagster_webserver_cli(),
    "posterpipe": typer.main.get_command(app),
}


def unit(name: str) -> configparser.SectionProxy:
    """What the unit says of its service; of several lines of one name the last."""
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(FOLDER / f"posterpipe-{name}.service")
    return parsed["Service"]


def _with_variables(line: str) -> str:
    """A line with the values that the environment file proposes, as systemd puts them in."""
    proposed = (FOLDER / "posterpipe.env").read_text("utf-8")
    return re.sub(
        r"\$(\w+)",
        lambda match: shlex.split(re.search(rf"^#?{match[1]}=(.*)$", proposed, re.M)[1])[0],  # type: ignore[index]
        line,
    )


def started(name: str) -> tuple[str, dict[str, Any]]:
    """The program that a unit starts, and its options as the program reads them."""
    line = unit(name)["ExecStart"]
    assert line.startswith(INSTALLED)
    program, *words = shlex.split(_with_variables(line.removeprefix(INSTALLED)))
    command = COMMANDS[program]
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    # Raises UsageError where it has no such option.
    return program, command.make_context(program, words).params


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_what_a_unit_starts_is_there_and_takes_these_options(path: Path) -> None:
    name = path.stem.removeprefix("posterpipe-")
    program, _ = started(name)
    assert (Path(sys.executable).parent / program).exists()
    service = unit(name)
    assert service["EnvironmentFile"] == "-/etc/posterpipe.env"
    assert service["WorkingDirectory"] == INSTALLED.removesuffix("/.venv/bin/")
    text = path.read_text("utf-8")
    assert "PartOf=posterpipe.target" in text and "WantedBy=posterpipe.target" in text


def test_the_units_are_valid(tmp_path: Path) -> None:
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("no systemd-analyze")
    for path in FOLDER.iterdir():
        text = path.read_text("utf-8").replace(INSTALLED, f"{Path(sys.executable).parent}/")
        text = re.sub("^User=.*$", "", text, flags=re.M)
        (tmp_path / path.name).write_text(text.replace("/opt/posterpipe", str(ROOT)), "utf-8")
    units = [tmp_path / path.name for path in (*UNITS, FOLDER / "posterpipe.target")]
    done = subprocess.run([verifier, "verify", *units], capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path) not in done.stderr, done.stderr


def test_the_code_server_is_the_one_that_the_others_load() -> None:
    code = started("code")[1]
    served = yaml.safe_load((FOLDER / "workspace.yaml").read_text("utf-8"))
    (server,) = (entry["grpc_server"] for entry in served["load_from"])
    assert (server["host"], server["port"]) == (code["host"], code["port"])
    for name in ("daemon", "webserver"):
        assert list(started(name)[1]["workspace"]) == ["deploy/systemd/workspace.yaml"]
    (usual,) = yaml.safe_load((ROOT / "workspace.yaml").read_text("utf-8"))["load_from"]
    # The location's name is in Dagster's history: with another one, runs and ticks would be lost.
    assert code["location_name"] == server["location_name"]
    assert code["location_name"] == usual["python_module"]["location_name"]
    assert code["module_name"] == usual["python_module"]["module_name"]
    assert server["host"] in _HERE, "the launcher does not see whether its runs live"


def test_a_training_that_is_stopped_has_the_time_to_save() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "dagster.yaml").read_text("utf-8"))
    seconds = int(unit("code")["TimeoutStopSec"])
    assert seconds == config["run_monitoring"]["cancel_timeout_seconds"] > STOPPING_SECONDS
    assert unit("code")["ExecStartPre"] == f"{INSTALLED}python -m posterpipe.home"


def test_nothing_listens_where_others_reach_it() -> None:
    for name in ("code", "webserver", "studio"):
        words = shlex.split(unit(name)["ExecStart"])
        assert words[words.index("--host") + 1] in _HERE


def test_the_settings_of_the_environment_file_are_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = (FOLDER / "posterpipe.env").read_text("utf-8").splitlines()
    set_there = re.findall(r"^#?(POSTERPIPE_\w+)=(.*)$", "\n".join(lines), flags=re.M)
    for name, value in set_there:
        monkeypatch.setenv(name, shlex.split(value)[0])
    settings = load_settings()
    assert len(set_there) > 2
    assert settings.alerts.webhook_url and settings.alerts.ui_url.startswith("https://dagster")


def test_postgresql_as_storage_is_what_dagster_reads(tmp_path: Path) -> None:
    (storage,) = (block.text for block in blocks("yaml") if "postgres" in block.text)
    usual = (ROOT / "deploy" / "dagster.yaml").read_text("utf-8")
    (tmp_path / "dagster.yaml").write_text(f"{usual}\n{storage}", "utf-8")
    config, _ = dagster_instance_config(str(tmp_path))
    assert config["storage"] == {"postgres": {"postgres_url": {"env": "DAGSTER_POSTGRES_URL"}}}
    assert "DAGSTER_POSTGRES_URL" in (FOLDER / "posterpipe.env").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    released = {
        re.split("[=<>]", line)[0]: line.partition("==")[2]
        for line in (*project["dependencies"], *project["optional-dependencies"]["postgres"])
    }
    assert released["dagster-postgres"] == released["dagster-dbt"], "of one release of Dagster"
