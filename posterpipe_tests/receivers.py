"""Receivers of alerts on this machine: a web server and a mail server, both real.

What belongs here: servers that keep what they get, and answer as a test says. What does not: what
is sent to them (tests of `core.alerts` and `defs.alerts`).
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from posterpipe.settings import AlertSettings

TOKEN = "B0T0K3N"
"""The part of the webhook's address that nobody may see."""


class Webhook:
    """A web server that keeps what it gets and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.answers: list[int] = []
        """What it answers next, 0 to hang up; 200 when it is told nothing."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = outer.answers.pop(0) if outer.answers else 200
                if status == 200:
                    outer.got.append(json.loads(body))
                if status:
                    self.send_response(status)
                    self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hooks/{TOKEN}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Mailbox:
    """A mail server that keeps what it gets and answers as it is told."""

    def __init__(self, **options: Any) -> None:
        self.got: list[Any] = []
        self.refusals: list[str] = []
        """What it answers next instead of taking a message."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port, **options)
        self._controller.start()

    @property
    def settings(self) -> AlertSettings:
        """That send to two people here."""
        return AlertSettings(
            email_to="ana@example.org, ben@example.org",
            email_from="posterpipe@example.org",
            smtp_host="127.0.0.1",
            smtp_port=self.port,
            smtp_security="none",
        )

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        if self.refusals:
            return self.refusals.pop(0)
        self.got.append(envelope)
        return "250 taken"

    def stop(self) -> None:
        self._controller.stop()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    webhook = Webhook()
    yield webhook
    webhook.stop()


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    mailbox.stop()
