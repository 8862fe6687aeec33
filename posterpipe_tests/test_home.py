"""DAGSTER_HOME: posterpipe's dagster.yaml is put there, and a person's own one is left alone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posterpipe.home import HomeError, prepare_home
from posterpipe.settings import default_root

DEPLOYED = default_root() / "deploy" / "dagster.yaml"
OWN = "storage:\n  postgres:\n    postgres_url: postgresql://dagster@db/dagster\n"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("DAGSTER_HOME", str(folder))
    return folder


def root_with(config: str, folder: Path) -> Path:
    (folder / "deploy").mkdir(parents=True)
    (folder / "deploy" / "dagster.yaml").write_text(config, "utf-8")
    return folder


def content(home: Path) -> object:
    return yaml.safe_load((home / "dagster.yaml").read_text("utf-8"))


def test_a_new_home_gets_the_configuration_of_one_machine(home: Path) -> None:
    assert prepare_home(default_root()) == home
    assert content(home) == yaml.safe_load(DEPLOYED.read_text("utf-8"))
    written = (home / "dagster.yaml").stat()
    prepare_home(default_root())
    assert (home / "dagster.yaml").stat() == written


@pytest.mark.parametrize("own", [OWN, DEPLOYED.read_text("utf-8") + OWN])
def test_a_configuration_of_ones_own_is_kept_and_one_line_says_so(
    home: Path, capsys: pytest.CaptureFixture[str], own: str
) -> None:
    home.mkdir()
    (home / "dagster.yaml").write_text(own, "utf-8")
    prepare_home(default_root())
    assert (home / "dagster.yaml").read_text("utf-8") == own
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{home / 'dagster.yaml'} is kept as it is" in told


def test_what_was_changed_by_hand_after_posterpipe_wrote_it_is_kept(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_home(default_root())
    assert not capsys.readouterr().err
    with open(home / "dagster.yaml", "a", encoding="utf-8") as file:
        file.write(OWN)
    changed = (home / "dagster.yaml").read_text("utf-8")
    prepare_home(default_root())
    assert (home / "dagster.yaml").read_text("utf-8") == changed
    assert "is kept as it is" in capsys.readouterr().err


def test_what_posterpipe_wrote_follows_its_new_version(home: Path, tmp_path: Path) -> None:
    prepare_home(root_with("telemetry: {enabled: true}\n", tmp_path / "old"))
    prepare_home(root_with("telemetry: {enabled: false}\n", tmp_path / "new"))
    assert content(home) == {"telemetry": {"enabled": False}}


@pytest.mark.parametrize("name", ["what?", "a%41b"])
def test_a_home_where_dagster_would_lose_its_history_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / name))
    with pytest.raises(HomeError, match=f"{re.escape(name)}: .*set DAGSTER_HOME"):
        prepare_home(default_root())
    assert not (tmp_path / name).exists()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "100% #1"))
    assert prepare_home(default_root()).name == "100% #1"


def test_make_dev_keeps_a_configuration_of_ones_own_too(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    (home / "dagster.yaml").write_text(OWN, "utf-8")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, line in (("python", f'exec {sys.executable} "$@"'), ("dagster", "echo served")):
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    served = subprocess.run(
        ["make", "-o", "install", "dev", f"BIN={tools}"],
        cwd=default_root(),
        env={**os.environ, "PYTHONPATH": str(default_root())},
        capture_output=True,
        text=True,
    )
    assert served.returncode == 0, served.stderr
    assert "served" in served.stdout and "is kept as it is" in served.stderr
    assert (home / "dagster.yaml").read_text("utf-8") == OWN


def test_an_address_that_is_taken_is_told_before_anything_starts(home: Path) -> None:
    def start(host: str, port: int | str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "posterpipe.home", host, str(port)]
        return subprocess.run(command, capture_output=True, text=True)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = start("127.0.0.1", port)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert f"at 127.0.0.1, port {port}" in refused.stderr
        assert "make dev PORT=" in refused.stderr
    assert start("127.0.0.1", port).returncode == 0
    for wrong in (70_000, 0, "abc", "-1"):
        refused = start("127.0.0.1", wrong)
        assert f"port {wrong} (a port is a number from 1 to 65535)" in refused.stderr
    assert "no.such.host.invalid" in start("no.such.host.invalid", port).stderr


def test_two_who_make_a_home_at_once_both_find_dagsters_history_in_it(home: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from posterpipe.home import prepare_home\n"
        "from posterpipe.settings import default_root\n"
        "from dagster import DagsterInstance\n"  # before, so that they come at the same time
        "prepare_home(default_root())\n"
        "with DagsterInstance.get() as instance:\n"
        "    print(instance.get_runs_count(), instance.all_instigator_state())\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in both:
        said, failed = process.communicate()
        assert said == "0 []\n", failed
