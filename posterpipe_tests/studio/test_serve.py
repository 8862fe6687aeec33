"""The command that serves the studio."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from posterpipe.studio.serve import (
    DARK,
    LIGHT,
    StudioError,
    _host_name,
    is_loopback,
    run_studio,
    server_options,
)
from posterpipe_tests.studio.serving import served


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


def handshake(port: int, host: str, origin: str) -> int:
    """The status with which the page's WebSocket is answered: 101 where it is opened."""
    lines = (
        "GET /_stcore/stream HTTP/1.1", f"Host: {host}", f"Origin: {origin}",
        "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", "",
    )  # fmt: skip
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.recv(100).split()[1])


@pytest.mark.parametrize(
    ("options", "answer"), [((), 403), (("--public-host", "studio.example.org"), 101)]
)
def test_behind_a_proxy_the_studio_works_under_the_names_that_were_given_alone(
    tmp_path: Path, options: tuple[str, ...], answer: int
) -> None:
    with served(tmp_path, *options) as (port, _):
        own = f"127.0.0.1:{port}"
        assert handshake(port, own, f"http://{own}") == 101
        # Proxies hand on the name that was asked for, or write that of the studio in its place.
        for host in ("studio.example.org", own):
            assert handshake(port, host, "https://studio.example.org") == answer
            assert handshake(port, host, "https://evil.example.com") == 403
        assert handshake(port, "evil.example.com", "https://evil.example.com") == 403


@pytest.mark.parametrize(
    "name", ["https://studio.example.org", "a.org:443", "*", "a/b", "", "a..b"]
)
def test_what_is_no_name_of_a_host_is_one_sentence(name: str) -> None:
    with pytest.raises(StudioError, match="without https://"):
        run_studio("127.0.0.1", 8501, [name])


def test_a_name_is_asked_for_in_small_letters_however_it_was_given() -> None:
    assert _host_name("Studio.Example.ORG") == "studio.example.org"


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
