"""`posterpipe alerts test` and `posterpipe backup`, as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from posterpipe.cli import app
from posterpipe.core import generations
from posterpipe.core.store import Store
from posterpipe_tests.receivers import TOKEN, Mailbox, Webhook, mailbox, webhook

__all__ = ["mailbox", "webhook"]  # fixtures


def run(*words: str) -> Result:
    return CliRunner().invoke(app, words, catch_exceptions=False)


def mail_to(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mailbox.settings.model_dump(exclude_none=True).items():
        monkeypatch.setenv(f"POSTERPIPE_ALERTS__{name.upper()}", str(value))


def test_a_made_up_message_goes_over_each_channel(
    webhook: Webhook, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail_to(mailbox, monkeypatch)
    monkeypatch.setenv("POSTERPIPE_ALERTS__WEBHOOK_URL", webhook.url)
    told = run("alerts", "test")
    assert told.exit_code == 0
    assert told.output.splitlines() == ["webhook: sent", "e-mail: sent"]
    (payload,) = webhook.got
    assert "This is a test" in payload["text"] and len(mailbox.got) == 1


def test_a_channel_that_does_not_work_is_named_without_its_secret_and_the_other_is_tried(
    webhook: Webhook, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail_to(mailbox, monkeypatch)
    monkeypatch.setenv("POSTERPIPE_ALERTS__WEBHOOK_URL", webhook.url)
    webhook.answers = [404]
    told = run("alerts", "test")
    assert told.exit_code == 1
    assert "webhook: not sent: webhook at 127.0.0.1: it answered 404" in told.output
    assert "e-mail: sent" in told.output and TOKEN not in told.output


def test_without_a_receiver_it_says_what_to_set() -> None:
    told = run("alerts", "test")
    assert told.exit_code == 1 and "POSTERPIPE_ALERTS__WEBHOOK_URL" in told.output


def test_a_backup_has_what_the_settings_name_and_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = Store(tmp_path / "store").put(b"an image", ".png")
    for name in ("landing/a.png", "holdout/b.png", "suite.yaml", "home/dagster.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    for setting in ("store", "landing", "holdout"):
        monkeypatch.setenv(f"POSTERPIPE_{setting.upper()}", str(tmp_path / setting))
    monkeypatch.setenv("POSTERPIPE_PROMPT_SUITE", str(tmp_path / "suite.yaml"))
    monkeypatch.setenv("POSTERPIPE_CAPTIONS", str(tmp_path / "captions.csv"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    backup = tmp_path / "backup [old] :cat: [" / "monday]"
    told = run("backup", str(backup))
    assert told.exit_code == 0 and f"5 files, 61 bytes, in {backup};" in told.output
    copy = backup / "elsewhere" / tmp_path.relative_to("/")
    for name in ("landing/a.png", "holdout/b.png", "suite.yaml", "home/dagster.yaml"):
        assert (copy / name).read_bytes() == name.encode()
    assert Store(copy / "store").has(blob, ".png")
    assert f"{tmp_path / 'captions.csv'} is not there" in told.output
    monkeypatch.setenv("POSTERPIPE_LANDING", "s3://bucket/posters")
    again = run("backup", str(tmp_path / "second"))
    assert "the posters in s3://bucket/posters are not copied" in again.output


def test_draw_says_where_it_cannot_write_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTERPIPE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(generations, "Sampler", None)  # drawing would fail otherwise
    (tmp_path / "file").touch()
    told = run("draw", "data/models/starter/base", str(tmp_path / "file"))
    assert told.exit_code == 1
    assert f"{tmp_path / 'file'}: cannot be written" in told.output
