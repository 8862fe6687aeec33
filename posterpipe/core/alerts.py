"""Telling people that a run or a check failed: a message, sent to a webhook and by e-mail.

What belongs here: how the message reads, and how it is sent so that a slow or broken receiver
delays little and breaks nothing. What does not: what failed and who was told (`defs.alerts`).

Addresses of webhooks are secrets, since whoever knows one can write there: no message of an error
names more of it than the host.
"""

from __future__ import annotations

import smtplib
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from posterpipe.settings import AlertSettings

WEBHOOK, EMAIL = "webhook", "e-mail"
CHANNELS = (WEBHOOK, EMAIL)

PAUSES = (1.0, 3.0)
"""Seconds before the second and the third attempt; after that the next look tries again."""

TIMEOUT = 6.0
"""Seconds for one attempt. Three of them and the pauses stay below the minute that Dagster gives a
sensor, with both channels."""

_REASON, _STEPS, _TEXT = 600, 5, 1900
"""Characters of a reason, steps named, and characters of all: chats cut at 2,000."""


class AlertNotSent(Exception):
    """A message did not reach its receiver. The message says why, without secrets."""


@dataclass(frozen=True)
class FailedRun:
    """What is known of a run that failed."""

    run_id: str
    job: str
    reasons: Sequence[tuple[str, str]]
    """Step and why it failed; the step is empty where the run failed as a whole."""
    started_by: str = ""
    """Sensor, schedule or person, in words."""
    why: str = ""
    """Why the run was started, in words."""
    ended_at: float = 0.0
    """Seconds since 1970."""
    retried: bool = False
    """Whether another run was started in its place already."""
    checks: Sequence[tuple[str, str]] = ()
    """Checks that failed in it, each with what it found and what to do."""


@dataclass(frozen=True)
class FailedCheck:
    """What is known of a check that failed in a run that did not."""

    asset: str
    check: str
    found: str
    """What it found and what to do."""
    run_id: str
    ended_at: float = 0.0
    """When it was looked at, in seconds since 1970."""


@dataclass(frozen=True)
class Alert:
    """A message."""

    subject: str
    text: str
    payload: dict[str, Any] = field(hash=False)
    """What a webhook gets as JSON: `text` is what Slack and Mattermost show, `content` what Discord
    does; the rest is for programs."""


def compose(run: FailedRun, settings: AlertSettings) -> Alert:
    """The message about a failed run: what, why, and where to look."""
    steps = [step for step, _ in run.reasons if step]
    where = f" at {steps[0]}" if steps else ""
    subject = _one_line(f"posterpipe: {run.job} failed{where}")
    lines = [subject, ""]
    for step, reason in run.reasons[:_STEPS]:
        reason = _shortened(reason.strip() or "no reason given", _REASON)
        lines.append(f"{step}: {reason}" if step else reason)
    if len(run.reasons) > _STEPS:
        lines.append(f"and {len(run.reasons) - _STEPS} more steps")
    if not run.reasons:
        lines.append("Dagster names no reason; its log may.")
    lines += [f"{check}: {_shortened(found, _REASON)}" for check, found in run.checks[:_STEPS]]
    if len(run.checks) > _STEPS:
        lines.append(f"and {len(run.checks) - _STEPS} more checks")
    lines.append("")
    if run.started_by:
        lines.append(f"Started by {run.started_by}" + (f": {run.why}" if run.why else ""))
    if run.retried:
        lines.append("It was started once more by itself.")
    details = {
        "event": "run_failed",
        "run_id": run.run_id,
        "job": run.job,
        "steps": steps,
        "checks": [check for check, _ in run.checks],
        "started_by": run.started_by,
        "ended_at": run.ended_at,
    }
    return _alert(subject, lines, run.run_id, details, settings)


def compose_check(check: FailedCheck, settings: AlertSettings) -> Alert:
    """The message about a failed check: what it found, what to do, and where to look."""
    subject = _one_line(f"posterpipe: check {check.check} of {check.asset} failed")
    lines = [subject, "", _shortened(check.found, _REASON), "", "Its run went on."]
    details = {
        "event": "check_failed",
        "run_id": check.run_id,
        "asset": check.asset,
        "check": check.check,
        "ended_at": check.ended_at,
    }
    return _alert(subject, lines, check.run_id, details, settings)


def _alert(
    subject: str,
    lines: Sequence[str],
    run_id: str,
    details: Mapping[str, Any],
    settings: AlertSettings,
) -> Alert:
    """The message of these lines with a link to the run, which stays where they are cut."""
    url = f"{settings.ui_url.rstrip('/')}/runs/{run_id}"
    closing = f"Run {run_id[:8]}: {url}"
    text = _shortened("\n".join(lines), _TEXT - len(closing) - 1) + "\n" + closing
    return Alert(subject, text, {"text": text, "content": text, **details, "url": url})


def channels(settings: AlertSettings) -> list[str]:
    """The channels that are configured."""
    configured = {WEBHOOK: settings.webhook_url, EMAIL: settings.email_to.strip()}
    return [name for name in CHANNELS if configured[name]]


def send(alert: Alert, channel: str, settings: AlertSettings) -> None:
    """Send a message over one channel, several times if need be. Raises AlertNotSent."""
    if channel == WEBHOOK:
        _attempt(lambda: _post(alert, settings))
    else:
        _attempt(lambda: _mail(alert, settings))


class _TryAgain(Exception):
    """A failure that may pass."""


def _attempt(send_once: Callable[[], None]) -> None:
    for pause in (*PAUSES, None):
        try:
            return send_once()
        except _TryAgain as error:
            if pause is None:
                raise AlertNotSent(f"{error} ({len(PAUSES) + 1} attempts)") from None
            time.sleep(pause)


def _post(alert: Alert, settings: AlertSettings) -> None:
    import httpx

    assert settings.webhook_url is not None
    url = settings.webhook_url.get_secret_value()
    try:
        host = urlsplit(url).hostname or "the webhook"
        answer = httpx.post(url, json=alert.payload, timeout=TIMEOUT, follow_redirects=False)
    except httpx.TransportError as error:
        # Only the kind: the text of some of them holds the whole address.
        raise _TryAgain(f"webhook at {host}: {type(error).__name__}") from None
    except (httpx.InvalidURL, ValueError) as error:
        raise AlertNotSent(
            f"alerts.webhook_url: not an address of a webhook ({type(error).__name__})"
        ) from None
    if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
        raise _TryAgain(f"webhook at {host}: it answered {answer.status_code}")
    if not answer.is_success:
        raise AlertNotSent(
            f"webhook at {host}: it answered {answer.status_code}; correct alerts.webhook_url"
        )


def _mail(alert: Alert, settings: AlertSettings) -> None:
    receivers = [address.strip() for address in settings.email_to.split(",") if address.strip()]
    sender = settings.email_from or f"posterpipe@{socket.getfqdn()}"
    message = EmailMessage()
    message["Subject"] = alert.subject
    message["From"] = sender
    message["To"] = ", ".join(receivers)
    message["Date"] = formatdate(localtime=True)
    message["Message-ID"] = make_msgid(domain=sender.rpartition("@")[2] or None)
    message["Auto-Submitted"] = "auto-generated"  # vacation notices do not answer it
    message.set_content(alert.text)
    server = f"mail server {settings.smtp_host}:{settings.smtp_port}"
    try:
        with _connected(settings) as connection:
            if settings.smtp_user and settings.smtp_password:
                connection.login(settings.smtp_user, settings.smtp_password.get_secret_value())
            connection.send_message(message, from_addr=sender, to_addrs=receivers)
    except (OSError, smtplib.SMTPException) as error:
        raise _mail_failure(server, error) from None


_REFUSALS: tuple[tuple[type[Exception], str], ...] = (
    (
        smtplib.SMTPAuthenticationError,
        "{server} refuses user and password; correct alerts.smtp_user and smtp_password",
    ),
    (smtplib.SMTPNotSupportedError, "{server}: {error}; correct alerts.smtp_security"),
    (
        ssl.SSLCertVerificationError,
        "{server}: its certificate is not trusted ({error.reason})",
    ),
)
"""Errors of a mail server that do not pass by themselves."""


def _mail_failure(server: str, error: Exception) -> _TryAgain | AlertNotSent:
    """What an error of a mail server comes to."""
    for kind, sentence in _REFUSALS:
        if isinstance(error, kind):
            return AlertNotSent(sentence.format(server=server, error=error))
    if isinstance(error, smtplib.SMTPResponseException):
        said = f"{server} answered {error.smtp_code}: {_text(error.smtp_error)}"
        return _TryAgain(said) if error.smtp_code < 500 else AlertNotSent(said)
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        refused = {name: f"{code} {_text(said)}" for name, (code, said) in error.recipients.items()}
        listed = "; ".join(f"{address}: {said}" for address, said in refused.items())
        if all(said.startswith("4") for said in refused.values()):
            return _TryAgain(f"{server} refuses for now {listed}")
        return AlertNotSent(f"{server} refuses {listed}; correct alerts.email_to")
    return _TryAgain(f"{server}: {error or type(error).__name__}")


def _connected(settings: AlertSettings) -> smtplib.SMTP:
    host, port = settings.smtp_host, settings.smtp_port
    if settings.smtp_security == "tls":
        tls = ssl.create_default_context()
        return smtplib.SMTP_SSL(host, port, timeout=TIMEOUT, context=tls)
    connection = smtplib.SMTP(host, port, timeout=TIMEOUT)
    if settings.smtp_security == "starttls":
        try:
            connection.starttls(context=ssl.create_default_context())
        except BaseException:
            connection.close()
            raise
    return connection


def _text(said: bytes | str) -> str:
    return _one_line(said.decode("utf-8", "replace") if isinstance(said, bytes) else said)


def _one_line(text: str) -> str:
    return _shortened(" ".join(text.split()), 200)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
