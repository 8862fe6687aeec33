"""What `posterpipe alerts test` does: sends a made-up message over each configured channel.

What belongs here: the made-up failure, and what the command prints. What does not: how a message
reads and is sent (`core.alerts`).
"""

from __future__ import annotations

import socket
import time

from rich.console import Console

from posterpipe.core.alerts import AlertNotSent, FailedRun, channels, compose, send
from posterpipe.settings import load_settings


def run_alerts_test() -> int:
    """Send it and print which channels worked; the exit code, 1 unless all of them did."""
    settings = load_settings().alerts
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    configured = channels(settings)
    if not configured:
        console.print(
            "Nobody to tell: set POSTERPIPE_ALERTS__WEBHOOK_URL or POSTERPIPE_ALERTS__EMAIL_TO."
        )
        return 1
    made_up = FailedRun(
        "00000000-0000-0000-0000-000000000000",
        "a made-up run",
        [("", f"This is a test by posterpipe alerts test on {socket.gethostname()}; all is well.")],
        started_by="a person",
        ended_at=time.time(),
    )
    alert = compose(made_up, settings)
    failed = 0
    for channel in configured:
        try:
            send(alert, channel, settings)
        except AlertNotSent as error:
            console.print(f"{channel}: not sent: {error}")
            failed += 1
        else:
            console.print(f"{channel}: sent")
    return 1 if failed else 0
