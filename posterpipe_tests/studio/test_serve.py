"""The command that serves the studio."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from posterpipe.studio.serve import DARK, LIGHT, is_loopback, server_options


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def test_the_command_line_does_not_pay_for_the_studio() -> None:
    heavy = "{'streamlit', 'torch', 'diffusers', 'transformers', 'pandas', 'duckdb'}"
    code = (
        "import sys, posterpipe.cli, posterpipe.studio, posterpipe.studio.serve; "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    assert run("-c", code).stdout.strip() == "[]"


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("-m", "posterpipe.cli", "studio", "--port", str(port))
    assert result.returncode == 1
    assert result.stderr.startswith(f"posterpipe: port {port} of 127.0.0.1 is taken")
    assert "--port" in result.stderr and "Traceback" not in result.stderr


def test_an_address_of_another_machine_is_one_sentence() -> None:
    result = run("-m", "posterpipe.cli", "studio", "--host", "192.0.2.1")
    assert result.returncode == 1
    assert "--host" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_only_this_machine_comes_in_by_default(host: str, own: bool) -> None:
    assert is_loopback(host) is own
    options = server_options(host, 8501)
    assert ("server_allowedHosts" in options) is own
    assert options["server_address"] == host


def test_nothing_is_told_to_others_and_nothing_is_taken_from_them() -> None:
    options = server_options("127.0.0.1", 8501)
    assert options["browser_gatherUsageStats"] is False
    assert options["server_enableXsrfProtection"] is True
    assert options["server_enableStaticServing"] is False
    assert options["client_showErrorDetails"] == "none"


def test_streamlit_knows_every_option() -> None:
    from streamlit import config

    known = set(config.get_config_options())
    assert {name.replace("_", ".") for name in server_options("127.0.0.1", 1)} <= known


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_text_can_be_read_on_its_ground(colours: dict[str, str]) -> None:
    from posterpipe.core.typography.colour import contrast_ratio

    def rgb(name: str) -> tuple[int, int, int]:
        digits = colours[name].removeprefix("#")
        return (int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16))

    for ground in ("backgroundColor", "secondaryBackgroundColor"):
        assert float(contrast_ratio(rgb("textColor"), rgb(ground))) >= 7
        assert float(contrast_ratio(rgb("linkColor"), rgb(ground))) >= 4.5
    assert float(contrast_ratio((255, 255, 255), rgb("primaryColor"))) >= 4.5
