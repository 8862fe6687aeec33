"""Messages about failed runs, sent to a real HTTP server and a real mail server on this machine."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import AuthResult, LoginPassword

from posterpipe.core.alerts import (
    EMAIL,
    WEBHOOK,
    AlertNotSent,
    FailedCheck,
    FailedRun,
    channels,
    compose,
    compose_check,
    send,
)
from posterpipe.settings import AlertSettings, SettingsError, load_settings
from posterpipe_tests.receivers import TOKEN, Mailbox, Webhook, mailbox, webhook

__all__ = ["mailbox", "webhook"]  # fixtures

RUN = FailedRun(
    "0123456789abcdef",
    "retrain",
    [("dreambooth_checkpoint", "out of memory: set train_batch_size to 1")],
    started_by="the schedule training",
    why="7 posters are new",
    ended_at=1.0,
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posterpipe.core.alerts.PAUSES", (0.0, 0.0))


def test_the_message_says_what_failed_why_and_where_to_look() -> None:
    alert = compose(RUN, AlertSettings(ui_url="https://dagster.example.org/"))
    assert alert.subject == "posterpipe: retrain failed at dreambooth_checkpoint"
    assert "out of memory: set train_batch_size to 1" in alert.text
    assert "Started by the schedule training: 7 posters are new" in alert.text
    assert "https://dagster.example.org/runs/0123456789abcdef" in alert.text
    assert alert.payload["text"] == alert.payload["content"] == alert.text
    assert alert.payload["steps"] == ["dreambooth_checkpoint"]


def test_a_long_reason_is_cut_and_the_link_stays() -> None:
    run = FailedRun("abc", "x", [(f"step_{n}", "long " * 1000) for n in range(9)])
    alert = compose(run, AlertSettings())
    assert len(alert.text) <= 1900
    assert alert.text.endswith("Run abc: http://127.0.0.1:3000/runs/abc")


def test_a_run_says_what_its_failed_checks_found() -> None:
    checks = [(f"posters: check_{n}", f"found {n}: mend it") for n in range(7)]
    alert = compose(FailedRun("abc", "x", [], checks=checks), AlertSettings())
    assert "posters: check_0: found 0: mend it\n" in alert.text
    assert "and 2 more checks" in alert.text
    assert alert.payload["checks"] == [name for name, _ in checks]


def test_a_failed_check_says_what_it_found_and_where_to_look() -> None:
    check = FailedCheck("clip_scores", "scores_are_current", "3 are old: " + "score " * 999, "abcd")
    alert = compose_check(check, AlertSettings())
    assert alert.subject == "posterpipe: check scores_are_current of clip_scores failed"
    assert "3 are old: score" in alert.text and len(alert.text) <= 1900
    assert alert.text.endswith("Run abcd: http://127.0.0.1:3000/runs/abcd")
    assert alert.payload["event"] == "check_failed" and alert.payload["text"] == alert.text


def test_a_subject_is_one_line_whatever_the_job_is_called() -> None:
    alert = compose(FailedRun("abc", "a\r\nBcc: eve@example.org", []), AlertSettings())
    assert "\n" not in alert.subject and "\r" not in alert.subject


def test_without_receivers_nothing_is_configured() -> None:
    assert channels(AlertSettings()) == []
    assert channels(AlertSettings(email_to=" ", webhook_url="")) == []


def test_a_webhook_gets_the_message_as_json(webhook: Webhook) -> None:
    settings = AlertSettings(webhook_url=webhook.url)
    assert channels(settings) == [WEBHOOK]
    alert = compose(RUN, settings)
    send(alert, WEBHOOK, settings)
    assert webhook.got == [alert.payload]


@pytest.mark.parametrize("answers", [[503, 429], [0, 500]])
def test_a_webhook_that_stumbles_is_tried_again(webhook: Webhook, answers: list[int]) -> None:
    settings = AlertSettings(webhook_url=webhook.url)
    webhook.answers = answers
    send(compose(RUN, settings), WEBHOOK, settings)
    assert len(webhook.got) == 1


@pytest.mark.parametrize("answers", [[500, 500, 500], [404]])
def test_an_error_names_the_host_and_no_secret(webhook: Webhook, answers: list[int]) -> None:
    settings = AlertSettings(webhook_url=webhook.url)
    webhook.answers = answers.copy()
    with pytest.raises(AlertNotSent) as failure:
        send(compose(RUN, settings), WEBHOOK, settings)
    assert "127.0.0.1" in str(failure.value) and str(answers[0]) in str(failure.value)
    assert TOKEN not in str(failure.value) + repr(failure.value.__cause__)
    assert webhook.got == [] and webhook.answers == []
    assert TOKEN not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()


def test_a_webhook_that_is_not_there_is_said_without_its_address() -> None:
    url = f"http://127.0.0.1:9/{TOKEN}"
    settings = AlertSettings(webhook_url=url)
    with pytest.raises(AlertNotSent, match=r"webhook at 127\.0\.0\.1: ConnectError") as failure:
        send(compose(RUN, settings), WEBHOOK, settings)
    assert TOKEN not in str(failure.value)


def test_what_is_no_address_of_a_webhook_is_said_without_it() -> None:
    for url in (f"http://[x/{TOKEN}", f"http://127.0.0.1:port/{TOKEN}"):
        settings = AlertSettings(webhook_url=url)
        with pytest.raises(AlertNotSent, match=r"alerts\.webhook_url: not an address") as failure:
            send(compose(RUN, settings), WEBHOOK, settings)
        assert TOKEN not in str(failure.value)


def test_an_e_mail_reaches_every_receiver(mailbox: Mailbox) -> None:
    settings = mailbox.settings
    assert channels(settings) == [EMAIL]
    send(compose(RUN, settings), EMAIL, settings)
    (envelope,) = mailbox.got
    assert envelope.rcpt_tos == ["ana@example.org", "ben@example.org"]
    content = envelope.content.decode()
    assert "Subject: posterpipe: retrain failed at dreambooth_checkpoint" in content
    assert "Auto-Submitted: auto-generated" in content
    assert "/runs/0123456789abcdef" in content


def test_a_mail_server_that_is_busy_is_tried_again(mailbox: Mailbox) -> None:
    settings = mailbox.settings
    mailbox.refusals = ["451 later", "421 later"]
    send(compose(RUN, settings), EMAIL, settings)
    assert len(mailbox.got) == 1


def test_a_mail_server_that_refuses_is_not_asked_again(mailbox: Mailbox) -> None:
    settings = mailbox.settings
    mailbox.refusals = ["554 no spam here", "554 never read"]
    with pytest.raises(AlertNotSent, match="554: no spam here"):
        send(compose(RUN, settings), EMAIL, settings)
    assert mailbox.refusals == ["554 never read"]


def test_mail_is_encrypted_and_signed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = self_signed(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    asked: list[Any] = []

    def authenticate(server: Any, session: Any, envelope: Any, how: str, data: Any) -> AuthResult:
        asked.append(data)
        return AuthResult(success=data == LoginPassword(b"ana", b"right"), handled=False)

    mailbox = Mailbox(
        tls_context=tls, require_starttls=True, authenticator=authenticate, auth_required=True
    )

    def settings(password: str, security: str = "starttls") -> AlertSettings:
        values = {
            "email_to": "ana@example.org",
            "smtp_host": "127.0.0.1",
            "smtp_port": mailbox.port,
        }
        return AlertSettings(
            **values,
            smtp_user="ana",
            smtp_password=password,
            smtp_security=security,
        )

    alert = compose(RUN, AlertSettings())
    try:
        with pytest.raises(AlertNotSent, match="certificate is not trusted"):
            send(alert, EMAIL, settings("right"))
        assert asked == []  # the password did not leave
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        send(alert, EMAIL, settings("right"))
        assert len(mailbox.got) == 1
        with pytest.raises(AlertNotSent, match="refuses user and password") as failure:
            send(alert, EMAIL, settings("s3cret"))
        assert "s3cret" not in str(failure.value)
    finally:
        mailbox.stop()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Certificate and key of 127.0.0.1."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    encoding = serialization.Encoding.PEM
    paths[0].write_bytes(certificate.public_bytes(encoding))
    paths[1].write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def test_a_receiver_that_hangs_is_given_up(
    webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posterpipe.core.alerts.TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        settings = AlertSettings(
            webhook_url=f"http://127.0.0.1:{port}/{TOKEN}",
            email_to="ana@example.org",
            smtp_host="127.0.0.1",
            smtp_port=port,
        )
        for channel in (WEBHOOK, EMAIL):
            started = time.monotonic()
            with pytest.raises(AlertNotSent):
                send(compose(RUN, settings), channel, settings)
            assert time.monotonic() - started < 5


def test_settings_come_from_the_environment_and_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POSTERPIPE_ALERTS__WEBHOOK_URL", f"https://example.org/{TOKEN}")
    monkeypatch.setenv("POSTERPIPE_ALERTS__EMAIL_TO", "ana@example.org,ben@example.org")
    settings = load_settings("starter").alerts
    assert channels(settings) == [WEBHOOK, EMAIL]
    monkeypatch.setenv("POSTERPIPE_ALERTS__WEBHOOK_URL", TOKEN)
    with pytest.raises(SettingsError, match=r"alerts\.webhook_url") as failure:
        load_settings("starter")
    assert TOKEN not in str(failure.value)
