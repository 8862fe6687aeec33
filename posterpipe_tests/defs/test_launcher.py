"""A run whose process is gone is noticed, and one that works is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.events import EngineEventData
from dagster._core.launcher import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG

from posterpipe.defs import launcher
from posterpipe.defs.launcher import LEASE_TAG, LocalRunLauncher, executing_runs
from posterpipe.defs.resources import TABLES, Deployment, store_tables
from posterpipe.settings import default_root, load_settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")


@dg.job
def nothing() -> None:
    """A job without steps."""


@dg.asset(io_manager_key=TABLES)
def at_work() -> None:
    """Works on, in a process of its own, and says so."""
    place = Path(os.environ["PLACE"])
    (place / "step.tmp").write_text(str(os.getpid()))
    (place / "step.tmp").rename(place / "step")
    time.sleep(60)


def job_at_work() -> dg.JobDefinition:
    """Makes that asset, as the deployment makes its own."""
    deployment = Deployment(load_settings("starter", store=Path(os.environ["PLACE"]) / "store"))
    return dg.Definitions(
        assets=[at_work],
        jobs=[dg.define_asset_job("work", dg.AssetSelection.all())],
        executor=dg.multiprocess_executor.configured({"max_concurrent": 1}),
        resources={TABLES: store_tables(deployment)},
    ).resolve_job_def("work")


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """The instance as it is deployed."""
    config = (default_root() / "deploy" / "dagster.yaml").read_text("utf-8")
    (tmp_path / "dagster.yaml").write_text(config)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


def run_of(instance: dg.DagsterInstance, pid: int, host: str = "localhost") -> dg.DagsterRun:
    """A run that a code server on that host, which is gone, started as that process."""
    run = instance.create_run_for_job(
        nothing,
        status=dg.DagsterRunStatus.STARTED,
        tags={GRPC_INFO_TAG: json.dumps({"host": host, "socket": "/nowhere"})},
    )
    data = EngineEventData.in_process(pid)
    instance.report_engine_event(f"Started process for run (pid: {pid}).", run, data)
    return run


def health(instance: dg.DagsterInstance, pid: int, host: str = "localhost") -> WorkerStatus:
    run = run_of(instance, pid, host)
    status: WorkerStatus = instance.run_launcher.check_run_worker_health(run).status
    return status


def test_the_deployment_uses_it_and_asks_it(deployed: dg.DagsterInstance) -> None:
    assert isinstance(deployed.run_launcher, LocalRunLauncher)
    assert deployed.run_launcher.supports_check_run_worker_health
    config = yaml.safe_load((default_root() / "deploy" / "dagster.yaml").read_text("utf-8"))
    assert config["run_monitoring"]["enabled"]
    assert deployed.run_monitoring_enabled


def test_a_live_process_is_running_and_a_dead_one_failed(deployed: dg.DagsterInstance) -> None:
    assert health(deployed, os.getpid()) == WorkerStatus.RUNNING
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    assert os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert health(deployed, child.pid) == WorkerStatus.FAILED  # ended, and not waited for
    child.wait()
    assert health(deployed, child.pid) == WorkerStatus.FAILED


def test_a_run_that_outlived_its_code_server_is_stopped_like_any_other(
    deployed: dg.DagsterInstance,
) -> None:
    # Whoever starts the tests may ignore the signal, and children would inherit that.
    script = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: print(1, flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: print(2)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "1\n"
    run = run_of(deployed, child.pid)
    assert deployed.run_launcher.terminate(run.run_id)
    assert child.communicate(timeout=30)[0] == "2\n"
    stopping = deployed.get_run_by_id(run.run_id)
    assert stopping is not None and stopping.status == dg.DagsterRunStatus.CANCELING
    # With its process gone, nobody else's is stopped.
    assert not deployed.run_launcher.terminate(run_of(deployed, child.pid).run_id)


def test_another_process_with_the_number_is_not_taken_for_it(
    deployed: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = launcher._began(os.getpid())
    assert began is not None
    assert 0 <= time.time() - began < 86_400
    monkeypatch.setattr(launcher, "_began", lambda pid: time.time() + 3_600)
    assert health(deployed, os.getpid()) == WorkerStatus.FAILED


def test_runs_of_others_are_not_judged(deployed: dg.DagsterInstance) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert health(deployed, child.pid, host="code-server") == WorkerStatus.RUNNING
    by_hand = deployed.create_run_for_job(nothing, status=dg.DagsterRunStatus.STARTED)
    status = deployed.run_launcher.check_run_worker_health(by_hand).status
    assert status == WorkerStatus.RUNNING


def test_a_run_under_a_lease_is_dead_when_its_process_gave_nothing_back(
    deployed: dg.DagsterInstance,
) -> None:
    def health_of(run: dg.DagsterRun) -> WorkerStatus:
        status: WorkerStatus = deployed.run_launcher.check_run_worker_health(run).status
        return status

    def started(tags: dict[str, str]) -> dg.DagsterRun:
        status = dg.DagsterRunStatus.STARTED
        return deployed.create_run_for_job(nothing, status=status, tags=tags)

    with executing_runs(deployed) as tags:
        run = started(tags)
        assert health_of(run) == WorkerStatus.RUNNING
    assert not list(Path(deployed.root_directory).glob("leases/*"))
    with pytest.raises(KeyboardInterrupt), executing_runs(deployed) as tags:
        run = started(tags)
        raise KeyboardInterrupt
    assert health_of(run) == WorkerStatus.FAILED
    # A lease whose run a daemon has marked before goes as well.
    with pytest.raises(KeyboardInterrupt), executing_runs(deployed):
        raise KeyboardInterrupt
    # Executed again in the UI, it has the tags of the one before and not its process.
    again = deployed.create_run_for_job(
        nothing,
        status=dg.DagsterRunStatus.STARTED,
        tags=tags,
        root_run_id=run.run_id,
        parent_run_id=run.run_id,
    )
    assert health_of(again) == WorkerStatus.RUNNING
    # As of another machine, whose leases lie elsewhere.
    assert health_of(started({LEASE_TAG: "elsewhere.lease"})) == WorkerStatus.RUNNING


def test_a_step_ends_with_the_process_of_its_run(
    deployed: dg.DagsterInstance, tmp_path: Path
) -> None:
    """Else it works on beside the one that is started again, though its run counts as failed."""
    run = "; ".join(
        (
            "import dagster as dg",
            f"from {__name__} import job_at_work",
            "dg.execute_job(dg.reconstructable(job_at_work), dg.DagsterInstance.get())",
        )
    )
    places = {"PLACE": str(tmp_path), "DAGSTER_HOME": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", run], env=os.environ | places)
    told = tmp_path / "step"
    step = ""
    try:
        wait_for(told.exists)
        step = told.read_text()
        assert launcher._began(int(step)) is not None and int(step) != process.pid
        process.kill()
        process.wait()
        wait_for(lambda: launcher._began(int(step)) is None)
    finally:
        process.kill()
        if step and launcher._began(int(step)) is not None:
            os.kill(int(step), signal.SIGKILL)


def wait_for(happened: Callable[[], bool], seconds: float = 30) -> None:
    """Returns when it has happened."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)
