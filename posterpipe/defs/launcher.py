"""How runs are started and stopped on one machine, and how it is noticed that one died.

What belongs here: Dagster's own launcher with what it lacks when the code server died, and the
lease of a process that executes runs itself. What does not: when runs start (`automation`,
`arrivals`, `retraining`) and what they do.

The code server notices when a run's process dies, but not when it dies itself together with its
runs, and runs of `posterpipe demo` have none: after a power cut or `kill -9` they would count as
running for ever, hold their places in the pools, and keep the schedule from training.
`run_monitoring` in dagster.yaml asks the launcher.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from dagster import DagsterEventType
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG

from posterpipe.core.leases import Leases
from posterpipe.defs.arrivals import UNFINISHED

LEASE_TAG = "posterpipe/lease"
"""Tag of runs that no code server executes: the lease of the process that does."""

_HERE = ("localhost", "127.0.0.1", "::1")

_CLOCKS_DIFFER = 60.0
"""Seconds by which the system's clock may have been set since."""

_GONE = "its process is gone"


class LocalRunLauncher(DefaultRunLauncher):
    """Dagster's default launcher; a run whose process is gone is found to have failed, and one that
    outlived its code server can still be stopped.

    Judges runs whose process holds a lease, and those that a code server on this machine started;
    the latter only on Linux.
    """

    def terminate(self, run_id: str) -> bool:
        """See RunLauncher. Asks the code server that started the run; where that is gone, the run's
        process itself, in the same way."""
        from grpc import RpcError

        try:
            stopped = bool(super().terminate(run_id))
        except (RpcError, DagsterUserCodeUnreachableError):
            stopped = False
        run = self._instance.get_run_by_id(run_id)
        if stopped or run is None or run.is_finished:
            return stopped
        process = _process_of(self._instance, run)
        if process is None or not process.alive:
            return False
        try:
            os.kill(process.pid, signal.SIGINT)
        except ProcessLookupError:  # it has just ended
            return False
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        """See RunLauncher: yes."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the process that executes a run is there."""
        running = CheckRunHealthResult(WorkerStatus.RUNNING)
        if _is_abandoned(self._instance, run):
            return CheckRunHealthResult(WorkerStatus.FAILED, _GONE)
        process = _process_of(self._instance, run)
        if process is None or process.alive:
            return running
        return CheckRunHealthResult(WorkerStatus.FAILED, f"its process (pid {process.pid}) is gone")


@contextmanager
def executing_runs(instance: dg.DagsterInstance) -> Iterator[dict[str, str]]:
    """The tags of runs that this process executes itself while inside: by them it is noticed when
    it dies."""
    lease = _leases(instance).take()
    try:
        yield {LEASE_TAG: lease.name} if lease else {}
    except BaseException:
        if lease:
            lease.abandon()  # its run may not have come to an end
        raise
    if lease:
        lease.give_back()


def end_dead_runs(instance: dg.DagsterInstance) -> None:
    """Runs under a lease whose process is gone are marked as failed, and give back their places in
    pools.

    The daemon of `make dev` does so too, with these and with those that it started.
    """
    leases = _leases(instance)
    # Asked for before the runs, so that the runs of all of them are among these. Some have no
    # unfinished one: a daemon may have marked it before.
    abandoned = leases.abandoned()
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        if _is_abandoned(instance, run):
            instance.report_run_failed(run, _GONE)
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            leases.remove(run.tags[LEASE_TAG])
    for name in abandoned:
        leases.remove(name)


def under_lease(run: dg.DagsterRun) -> bool:
    """Whether the process that started a run executes it itself, as `posterpipe demo` does."""
    # A run that is executed again in the UI has the tags of the run before, and not its process.
    return LEASE_TAG in run.tags and run.parent_run_id is None


def _is_abandoned(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    return under_lease(run) and _leases(instance).is_abandoned(run.tags[LEASE_TAG])


def _leases(instance: dg.DagsterInstance) -> Leases:
    return Leases(Path(instance.root_directory) / "leases")


@dataclass(frozen=True)
class _Process:
    """The process that a code server of this machine started for a run."""

    pid: int
    alive: bool


def _process_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> _Process | None:
    """None where that cannot be told: of other machines, before it was started, not on Linux."""
    server = json.loads(run.tags.get(GRPC_INFO_TAG, "{}"))
    if server.get("host") not in _HERE or not Path("/proc/stat").exists():
        return None
    started = [
        (entry.timestamp, entry.get_dagster_event().engine_event_data.metadata.get("pid"))
        for entry in instance.all_logs(run.run_id, of_type=DagsterEventType.ENGINE_EVENT)
        if str(entry.get_dagster_event().message).startswith("Started process for run")
    ]
    if not started or started[-1][1] is None:
        return None
    at, pid = started[-1][0], int(str(started[-1][1].value))
    began = _began(pid)
    # A process that began later only has its number.
    return _Process(pid, began is not None and began < at + _CLOCKS_DIFFER)


def _began(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None where there is no such process, or one
    that ended and was not waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(
            float(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime")
        )
    except (OSError, StopIteration):
        return None
    state, ticks = fields[0], int(fields[19])
    return None if state in "ZX" else boot + ticks / os.sysconf("SC_CLK_TCK")
