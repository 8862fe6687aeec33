"""The sensor that tells people of failed runs and checks: real runs, a real web server and mail
server."""

from __future__ import annotations

import time
from typing import Any

import dagster as dg
import pytest

from posterpipe.definitions import build_defs
from posterpipe.defs.alerts import TOLD_TAG, sensors, tell
from posterpipe.defs.arrivals import REASON_TAG
from posterpipe.defs.launcher import executing_runs
from posterpipe.defs.resources import Deployment
from posterpipe.settings import AlertSettings, Settings, load_settings
from posterpipe_tests.receivers import TOKEN, Mailbox, Webhook, mailbox, webhook

__all__ = ["mailbox", "webhook"]  # fixtures


class Watch:
    """A sensor with its cursor, on an instance whose runs and checks fail when they are to."""

    def __init__(self, instance: dg.DagsterInstance, alerts: AlertSettings) -> None:
        self.instance = instance
        self.settings = load_settings("starter", alerts=alerts)
        self.cursor: str | None = None
        self.problem: str | None = None
        """As what the asset fails."""
        self.found = dg.AssetCheckResult(passed=True)
        """What its checks find."""

        @dg.asset
        def posters() -> None:
            if self.problem:
                raise OSError(self.problem)

        @dg.asset_check(asset=posters)
        def looked_through() -> dg.AssetCheckResult:
            return self.found

        @dg.asset_check(asset=posters, blocking=True)
        def enough() -> dg.AssetCheckResult:
            return self.found

        self.posters, self.looked_through, self.enough = posters, looked_through, enough
        self.definitions = dg.Definitions(assets=[posters], asset_checks=[looked_through, enough])
        self.look()  # what failed before is history

    def look(self, later: float = 0.0) -> str:
        """One look, `later` seconds from now; what it said."""
        context = dg.build_sensor_context(
            self.instance, cursor=self.cursor, definitions=self.definitions
        )
        result = tell(context, self.settings, time.time() + later)
        self.cursor = result.cursor
        assert result.skip_reason is not None
        return str(result.skip_reason.skip_message)

    def fail(self, reason: str = "the disk is full", **tags: str) -> str:
        """A run that fails; its id."""
        self.problem = reason
        return self._run(tags=tags or None)

    def check(self, found: dg.AssetCheckResult, blocking: bool = False) -> str:
        """A run whose check finds that; its id."""
        self.problem, self.found = None, found
        return self._run(self.enough if blocking else self.looked_through)

    def _run(self, *checks: dg.AssetChecksDefinition, **options: Any) -> str:
        result = dg.materialize(
            [self.posters, *checks], instance=self.instance, raise_on_error=False, **options
        )
        return result.run_id

    def told(self, run_id: str) -> str:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run.tags.get(TOLD_TAG, "").removeprefix(f"{run_id[:8]}: ")


PASSED = dg.AssetCheckResult(passed=True)
WARNED = dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN)
FOUND = dg.AssetCheckResult(
    passed=False, description="3 usable posters; at least 5 are needed: put more into the folder"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posterpipe.core.alerts.PAUSES", (0.0,))


def to(webhook: Webhook, **more: Any) -> AlertSettings:
    return AlertSettings(webhook_url=webhook.url, **more)


def test_off_until_a_receiver_is_configured(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    def status(settings: Settings) -> dg.DefaultSensorStatus:
        (sensor,) = sensors(settings)
        return sensor.default_status

    assert status(load_settings("starter")) == dg.DefaultSensorStatus.STOPPED
    configured = load_settings("starter", alerts=to(webhook))
    assert status(configured) == dg.DefaultSensorStatus.RUNNING
    # Turned on by hand without a receiver it says what is missing.
    watch = Watch(instance, AlertSettings())
    watch.fail()
    assert "POSTERPIPE_ALERTS__WEBHOOK_URL" in watch.look()


def test_a_failed_run_is_told_once_with_its_reason(
    instance: dg.DagsterInstance, webhook: Webhook, mailbox: Mailbox
) -> None:
    mail = mailbox.settings.model_dump()
    watch = Watch(instance, AlertSettings(**mail | {"webhook_url": webhook.url}))
    tags = {"dagster/sensor_name": "arrivals", REASON_TAG: "3 posters are new"}
    run_id = watch.fail(**tags)
    assert watch.look() == f"run {run_id[:8]}: told by webhook, told by e-mail"
    (payload,) = webhook.got
    assert payload["run_id"] == run_id
    assert "posters: OSError: the disk is full" in payload["text"]
    assert "Started by the sensor arrivals: 3 posters are new" in payload["text"]
    assert len(mailbox.got) == 1
    assert watch.told(run_id) == "webhook, e-mail"
    assert "nothing failed untold" in watch.look()
    assert len(webhook.got) == len(mailbox.got) == 1


def test_a_run_that_is_executed_again_and_fails_again_is_told_too(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    watch = Watch(instance, to(webhook))
    first = watch.fail()
    watch.look()
    # As the UI does: the run has the tags of the one before.
    before = instance.get_run_by_id(first)
    assert before is not None and TOLD_TAG in before.tags
    again = watch.fail(**before.tags, **{"dagster/parent_run_id": first})
    assert f"run {again[:8]}: told by webhook" in watch.look()
    assert [payload["run_id"] for payload in webhook.got] == [first, again]


def test_what_failed_before_the_sensor_began_is_not_news(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    before = Watch(instance, AlertSettings())
    before.fail()
    time.sleep(0.05)
    watch = Watch(instance, to(webhook))
    assert "nothing failed untold" in watch.look()
    assert webhook.got == []


def test_a_message_that_does_not_get_through_is_sent_later(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    watch = Watch(instance, to(webhook))
    run_id = watch.fail()
    webhook.answers = [503] * 2
    said = watch.look()
    assert "not told by webhook, to be tried again" in said and "503" in said
    assert TOKEN not in said + str(watch.cursor)
    assert watch.told(run_id) == ""
    assert "told of later" in watch.look()  # not at once: the receiver is left in peace
    assert watch.look(later=61) == f"run {run_id[:8]}: told by webhook"
    assert len(webhook.got) == 1


def test_a_receiver_that_works_is_not_told_twice_because_of_one_that_does_not(
    instance: dg.DagsterInstance, webhook: Webhook, mailbox: Mailbox
) -> None:
    mail = mailbox.settings.model_dump()
    watch = Watch(instance, AlertSettings(**mail | {"webhook_url": webhook.url}))
    mailbox.refusals = ["554 not now"]
    run_id = watch.fail()
    watch.look()
    assert watch.told(run_id) == "webhook"
    watch.look(later=61)
    assert watch.told(run_id) == "webhook, e-mail"
    assert len(webhook.got) == len(mailbox.got) == 1


def test_pauses_grow_and_a_day_later_it_is_given_up(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    watch = Watch(instance, to(webhook))
    watch.fail()
    webhook.answers = [500] * 100
    attempts, later = 0, 0.0
    while later < 25 * 3600:
        attempts += "to be tried again" in watch.look(later)
        later += 600
    assert 25 <= attempts <= 35
    assert webhook.got == []
    assert "nothing failed untold" in watch.look(later)


def test_many_failures_at_once_are_told_over_several_looks(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    watch = Watch(instance, to(webhook))
    run_ids = [watch.fail() for _ in range(5)]
    assert "2 failures are told of later" in watch.look()
    watch.look()
    assert sorted(payload["run_id"] for payload in webhook.got) == sorted(run_ids)


def test_a_run_without_a_failed_step_is_told_of_as_well(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    watch = Watch(instance, to(webhook))

    @dg.job
    def nightly() -> None: ...

    run = instance.create_run_for_job(nightly)
    instance.report_run_failed(run, "its process is gone")
    watch.look()
    (payload,) = webhook.got
    assert payload["job"] == "nightly" and "its process is gone" in payload["text"]


def test_the_message_says_who_started_the_run(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    watch = Watch(instance, to(webhook))

    @dg.job
    def nightly() -> None: ...

    with executing_runs(instance) as tags:  # as `posterpipe demo` does
        first = instance.create_run_for_job(nightly, tags=tags)
        instance.report_run_failed(first, "the disk is full")
    again = instance.create_run_for_job(
        nightly, tags=tags, root_run_id=first.run_id, parent_run_id=first.run_id
    )
    instance.report_run_failed(again, "the disk is full")
    watch.look()
    said = {payload["run_id"]: payload["text"] for payload in webhook.got}
    assert "Started by posterpipe demo" in said[first.run_id]
    assert "Started by a person" in said[again.run_id]


def test_a_run_that_a_blocking_check_stopped_is_told_with_what_the_check_found(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    watch = Watch(instance, to(webhook))
    run_id = watch.check(FOUND, blocking=True)
    assert watch.look() == f"run {run_id[:8]}: told by webhook"
    (payload,) = webhook.got
    assert f"posters: enough: {FOUND.description}" in payload["text"]
    assert payload["checks"] == ["posters: enough"]


def test_a_check_that_fails_as_an_error_is_told_once_until_it_passes(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    watch = Watch(instance, to(webhook))
    run_id = watch.check(FOUND)
    assert watch.look() == "check posters: looked_through: told by webhook"
    (payload,) = webhook.got
    assert payload["event"] == "check_failed" and payload["run_id"] == run_id
    assert "check looked_through of posters failed" in payload["text"]
    assert str(FOUND.description) in payload["text"] and f"/runs/{run_id}" in payload["text"]
    watch.check(FOUND)  # as every day
    assert "nothing failed untold" in watch.look()
    watch.check(PASSED)
    assert "nothing failed untold" in watch.look()
    watch.check(FOUND)
    watch.look()
    assert len(webhook.got) == 2


def test_warnings_and_checks_that_failed_before_are_not_told(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    before = Watch(instance, AlertSettings())
    before.check(FOUND)
    time.sleep(0.05)
    watch = Watch(instance, to(webhook))
    assert "nothing failed untold" in watch.look()
    watch.check(WARNED)
    assert "nothing failed untold" in watch.look()
    assert webhook.got == []


def test_a_check_of_a_run_that_failed_is_told_with_the_run(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    watch = Watch(instance, to(webhook))

    @dg.asset(deps=[watch.posters])
    def captions() -> None:
        raise OSError("the disk is full")

    watch.found = FOUND
    result = dg.materialize(
        [watch.posters, captions, watch.looked_through], instance=instance, raise_on_error=False
    )
    assert watch.look() == f"run {result.run_id[:8]}: told by webhook"
    assert "nothing failed untold" in watch.look()
    (payload,) = webhook.got
    assert payload["checks"] == ["posters: looked_through"]
    assert "the disk is full" in payload["text"] and str(FOUND.description) in payload["text"]


def test_a_failed_check_is_told_later_where_a_receiver_is_down(
    instance: dg.DagsterInstance, webhook: Webhook, mailbox: Mailbox
) -> None:
    mail = mailbox.settings.model_dump()
    watch = Watch(instance, AlertSettings(**mail | {"webhook_url": webhook.url}))
    watch.check(FOUND)
    webhook.answers = [503] * 2
    assert "told by e-mail, not told by webhook, to be tried again" in watch.look()
    assert "1 failures are told of later" in watch.look()
    assert watch.look(later=61) == "check posters: looked_through: told by webhook"
    assert len(webhook.got) == len(mailbox.got) == 1


def test_the_sensor_of_the_definitions_tells(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    settings = load_settings("starter", alerts=to(webhook))
    definitions = build_defs(settings)
    sensor = definitions.resolve_sensor_def("failure_alerts")
    watch = Watch(instance, settings.alerts)
    run_id = watch.fail()
    context = dg.build_sensor_context(
        instance,
        cursor=watch.cursor,
        definitions=definitions,
        resources={"deployment": Deployment(settings)},
    )
    assert run_id[:8] in str(sensor.evaluate_tick(context).skip_message)
    assert len(webhook.got) == 1
