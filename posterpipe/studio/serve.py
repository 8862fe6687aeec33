"""What `posterpipe studio` does: serves the studio on this machine.

What belongs here: the server's settings and the theme's colours. What does not: pages (`app`).

Everything is set here and not in a config.toml, since the command may be started in any folder;
what is set here wins over such files.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posterpipe.addresses import try_address
from posterpipe.settings import load_settings

APP = Path(__file__).with_name("app.py")

LIGHT = {
    "primaryColor": "#2f5d62",
    "backgroundColor": "#fbfaf7",
    "secondaryBackgroundColor": "#f2efe8",
    "textColor": "#24222b",
    "borderColor": "#d8d2c5",
    "linkColor": "#2f5d62",
}
"""Paper and ink, with one deep green; text has a contrast of 15, white on the green 7."""

DARK = {
    "primaryColor": "#3d7a7d",
    "backgroundColor": "#16171b",
    "secondaryBackgroundColor": "#22242a",
    "textColor": "#ece9e2",
    "borderColor": "#3a3d45",
    "linkColor": "#8cc4c1",
}


_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.IGNORECASE)


class StudioError(RuntimeError):
    """The studio cannot be served. The message says what to do."""


def run_studio(host: str, port: int, public_hosts: Sequence[str] = ()) -> None:
    """Serve the studio until it is stopped. Raises SettingsError and StudioError.

    `public_hosts`: names by which browsers reach it through a proxy.
    """
    load_settings()  # a wrong setting is told here, and not to every visitor
    names = [_host_name(name) for name in public_hosts]
    _require_free(host, port)
    try:
        from streamlit.web import bootstrap
    except ImportError as error:
        raise StudioError(f"{error}; install posterpipe again, which brings Streamlit") from error
    if not is_loopback(host):
        print(
            f"The studio has no login: whoever reaches {host}:{port} can use the model and change "
            "captions.",
            file=sys.stderr,
        )
    # Its notes on every visit are of no use to who runs a studio.
    logging.getLogger("streamlit").setLevel(logging.WARNING)
    options = server_options(host, port, names)
    bootstrap.load_config_options(flag_options=options)
    bootstrap.run(str(APP), False, [], options)


def server_options(host: str, port: int, public_hosts: Sequence[str] = ()) -> dict[str, Any]:
    """Streamlit's options by the names of its command line, dots as underscores.

    `public_hosts` come in as this machine does: named as the host that is asked, where the proxy
    hands that on, or as the origin of the page, where it does not.
    """
    options: dict[str, Any] = {
        "server_address": host,
        "server_port": port,
        "server_headless": True,
        "server_showEmailPrompt": False,
        "server_enableXsrfProtection": True,
        "server_enableCORS": True,
        "server_corsAllowedOrigins": [f"https://{name}" for name in public_hosts],
        "server_enableStaticServing": False,
        "server_fileWatcherType": "none",
        "server_runOnSave": False,
        "server_maxUploadSize": 1,  # MB; no page takes files
        "browser_gatherUsageStats": False,
        "browser_serverAddress": host,
        "browser_serverPort": port,
        "global_developmentMode": False,
        "client_toolbarMode": "viewer",
        # What a failure says of the machine is for the log, and not for visitors.
        "client_showErrorDetails": "none",
        "client_showErrorLinks": False,
        "runner_magicEnabled": False,
        "theme_headingFont": "serif",
        "theme_baseRadius": "0.5rem",
        "theme_showWidgetBorder": True,
    }
    if is_loopback(host):
        # A page elsewhere that points a name of its own at this machine gets nothing.
        options["server_allowedHosts"] = ["localhost", "127.0.0.1", "::1", *public_hosts]
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        options |= {f"theme_{name}_{key}": value for key, value in colours.items()}
    return options


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_name(name: str) -> str:
    """The name as browsers send it. Raises StudioError for what is more than a host's name."""
    try:
        plain = name.encode("idna").decode().lower()
    except UnicodeError:
        plain = ""
    if not _HOST.fullmatch(plain):
        raise StudioError(
            f"--public-host {name!r} is no host's name; write it without https://, port and path, "
            "as studio.example.org"
        )
    return plain


def _require_free(host: str, port: int) -> None:
    """Raises StudioError where nothing can be served at that address."""
    try:
        try_address(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StudioError(
                f"port {port} of {host} is taken; end what listens there, or choose another one "
                "with --port"
            ) from error
        raise StudioError(
            f"{host}:{port} cannot be served ({error.strerror or error}); choose an address of "
            "this machine with --host and a port above 1023 with --port"
        ) from error
