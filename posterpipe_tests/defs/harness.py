"""A small world in which automation is tried out: real runs on a real instance, tick by tick.

What belongs here: in-test assets under the same policy as posterpipe's, and the daemon's part,
played in this process: it looks, queues runs and works them off, each when the test says so. What
does not: what must hold (the tests).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import DagsterEvent, DagsterEventType
from dagster._core.definitions.asset_daemon_cursor import AssetDaemonCursor
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from posterpipe.core.store import Store, compute_missing, content_key
from posterpipe.defs.automation import with_policy
from posterpipe.defs.metadata import DATA_VERSION
from posterpipe.defs.resources import Deployment
from posterpipe.defs.staleness import CODE_VERSION, INPUT_DATA_VERSION
from posterpipe.defs.sweep import stale_sweep
from posterpipe.settings import load_settings

CHECK = "holds"
RUN_KEY = "dagster/run_key"
QUIET_AFTER = 12
"""Ticks after which a world that still requests runs is not going to stop."""


class Broken(Exception):
    """An asset that is to fail does so."""


class Daemon:
    """Looks at definitions as the daemon does, and works off the runs that it queued."""

    def __init__(self, definitions: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.queue: list[str] = []
        """Ids of the runs that wait, oldest first."""
        self.said = ""
        """The skip reason of the last sweep."""
        self._policy_cursor: AssetDaemonCursor | None = None
        self._sweep_cursor: str | None = None
        self.load(definitions)

    def load(self, definitions: dg.Definitions) -> None:
        """Use other definitions from now on, as after an upgrade; cursors stay."""
        self.definitions = definitions
        job = definitions.resolve_implicit_global_asset_job_def()
        self._job = job.with_executor_def(dg.in_process_executor)

    def tick(self) -> list[str]:
        """Evaluate the policy once; the names of what it requested, queued as one run."""
        result = dg.evaluate_automation_conditions(
            self.definitions, self.instance, cursor=self._policy_cursor
        )
        self._policy_cursor = result.cursor
        keys = self.definitions.resolve_asset_graph().get_all_asset_keys()
        requested = [key.to_user_string() for key in keys if result.get_num_requested(key)]
        if requested:
            self.enqueue(requested)
        return sorted(requested)

    def sweep(self, *, forget: bool = False) -> list[str]:
        """Evaluate the stale sweep once; the names of what it requested, queued one run each.

        A run key that was used before requests nothing, as in the daemon. With `forget` the cursor
        is not kept, as when the daemon dies after a tick.
        """
        context = dg.build_sensor_context(
            self.instance,
            cursor=self._sweep_cursor,
            definitions=self.definitions,
            resources={"deployment": (self.definitions.resources or {})["deployment"]},
        )
        data = stale_sweep.evaluate_tick(context)
        if not forget:
            self._sweep_cursor = data.cursor
        self.said = data.skip_message or ""
        requested = []
        for request in data.run_requests or []:
            tags = {**request.tags, RUN_KEY: str(request.run_key)}
            if self.instance.get_runs(dg.RunsFilter(tags={RUN_KEY: str(request.run_key)})):
                continue
            names = [key.to_user_string() for key in request.asset_selection or []]
            self.enqueue(names, tags)
            requested += names
        return sorted(requested)

    def enqueue(self, names: Iterable[str], tags: Mapping[str, str] | None = None) -> str:
        """Queue a run that makes these assets, with their checks; its id."""
        keys = {dg.AssetKey(name) for name in names}
        run = self.instance.create_run_for_job(
            self._job.get_subset(asset_selection=keys),
            asset_selection=keys,
            tags=tags,
        )
        # Only then does the run count as in progress. The daemon puts it into its queue instead,
        # which counts as well, but takes runs from a code location in another process only.
        starting = DagsterEvent(DagsterEventType.PIPELINE_STARTING.value, self._job.name)
        self.instance.report_dagster_event(starting, run_id=run.run_id)
        self.queue.append(run.run_id)
        return run.run_id

    def work(self) -> list[bool]:
        """Work off the queued runs; whether each went well."""
        done = []
        while self.queue:
            done.append(self._execute(self.queue.pop(0)))
        return done

    def run(self, *names: str) -> bool:
        """Make these assets in one run at once, as a person or another sensor would."""
        run_id = self.enqueue(names)
        self.queue.remove(run_id)
        return self._execute(run_id)

    def cancel(self, run_id: str) -> None:
        """End a queued run as a person does in the UI."""
        self.queue.remove(run_id)
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        self.instance.report_run_canceling(run)
        self.instance.report_run_canceled(run)

    def check(self, name: str) -> bool:
        """Run the check of an asset alone; whether the run went well."""
        job = self._job.get_subset(
            asset_selection=set(),
            asset_check_selection={dg.AssetCheckKey(dg.AssetKey(name), CHECK)},
        )
        return job.execute_in_process(instance=self.instance, raise_on_error=False).success

    def settle(self) -> list[list[str]]:
        """Tick and work until a tick requests nothing and nothing is queued; what each requested.

        Fails when that does not come.
        """
        return self._until_quiet(self.tick)

    def settle_by_sweeps(self) -> list[list[str]]:
        """The same by sweeps alone, until two in a row request nothing."""
        return self._until_quiet(lambda: [*self.sweep(), *self.sweep()])

    def _until_quiet(self, look: Callable[[], list[str]]) -> list[list[str]]:
        requested: list[list[str]] = []
        self.work()
        while names := look():
            requested.append(names)
            assert len(requested) < QUIET_AFTER, f"does not come to rest: {requested}"
            self.work()
        return requested

    def _execute(self, run_id: str) -> bool:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return execute_run(InMemoryJob(self._job), run, self.instance).success


def report_all_made(
    definitions: dg.Definitions, instance: dg.DagsterInstance, **metadata: Mapping[str, Any]
) -> None:
    """Let the instance believe that every asset was made from what there is, and passed its checks.

    `metadata`: what the materializations of some assets say besides, by the asset's name.
    """
    graph = definitions.resolve_asset_graph()
    for spec in definitions.resolve_all_asset_specs():
        report_made(spec, instance, metadata.get(spec.key.to_user_string(), {}))
    for check in graph.asset_check_keys:
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=check.asset_key, check_name=check.name, passed=True, metadata={}
            )
        )


def report_made(
    spec: dg.AssetSpec,
    instance: dg.DagsterInstance,
    metadata: Mapping[str, Any],
    version: str = "1",
    inputs: Mapping[str, str] | None = None,
) -> None:
    """The same of one asset: its data version, and those of its inputs, "1" unless given."""
    used = {dep.asset_key.to_user_string(): "1" for dep in spec.deps} | dict(inputs or {})
    tags = {INPUT_DATA_VERSION + name: read for name, read in used.items()}
    tags[DATA_VERSION] = version
    if spec.code_version:
        tags[CODE_VERSION] = spec.code_version
    instance.report_runless_asset_event(
        dg.AssetMaterialization(spec.key, tags=tags, metadata=dict(metadata))
    )


class World(Daemon):
    """Assets whose contents are text, made from the contents of their inputs.

    `reads` names the inputs of each asset; those without inputs read `outside`. An asset's content
    tells how it was made, `c(b(1) a)`, and is its data version. Like posterpipe's assets these keep
    what they computed in a store, under a key of everything that decides it.
    """

    def __init__(
        self,
        home: Path,
        instance: dg.DagsterInstance,
        reads: Mapping[str, Sequence[str]],
        *,
        checked: Iterable[str] = (),
    ) -> None:
        self.reads = dict(reads)
        self.checked = set(checked)
        """Assets with a blocking check."""
        self.outside = {name: "1" for name, inputs in reads.items() if not inputs}
        """What the assets without inputs find."""
        self.contents: dict[str, str] = {}
        """What every asset holds now."""
        self.code: dict[str, str] = {}
        """Code versions other than "1"; `deploy` puts them in force."""
        self.shown: dict[str, Callable[[str], str]] = {}
        """What comes out of an asset, where it is less than all that it read."""
        self.broken: set[str] = set()
        """Assets that fail, and checks that do not come to a result: `a`, `check of a`."""
        self.failing: set[str] = set()
        """Assets whose check does not pass."""
        self.meanwhile: dict[str, Callable[[], object]] = {}
        """What happens, once, while an asset is made, after it has read its inputs."""
        self.started: list[str] = []
        """Assets in the order in which their runs reached them."""
        self.computed: list[str] = []
        """The same, where the store did not hold the result."""
        self.home = home
        self._store = Store(home / "store")
        self.resources = {"deployment": Deployment(load_settings("starter", store=home / "store"))}
        super().__init__(self._define(), instance)

    def deploy(self) -> None:
        """Load the code again, with `reads` and `code` as they are now."""
        self.load(self._define())

    def change(self, name: str, content: str) -> bool:
        """Let the world outside change, and its asset look; whether that run went well."""
        self.outside[name] = content
        return self.run(name)

    def expected(self, name: str) -> str:
        """What the asset would hold if everything were made now, from nothing."""
        inputs = [self.expected(upstream) for upstream in self.reads[name]]
        return self._content(name, inputs)

    def stale(self) -> list[str]:
        """Assets that do not hold what they should."""
        return [name for name in self.reads if self.contents.get(name) != self.expected(name)]

    def _define(self) -> dg.Definitions:
        assets = [self._asset(name) for name in self.reads]
        return dg.Definitions(
            assets=with_policy(assets, self.resources["deployment"]),
            asset_checks=[self._check(name) for name in sorted(self.checked)],
            sensors=[stale_sweep],
            resources=self.resources,
        )

    def _asset(self, name: str) -> dg.AssetsDefinition:
        @dg.asset(name=name, deps=self.reads[name], code_version=self.code.get(name, "1"))
        def asset() -> dg.MaterializeResult[Any]:
            content = self._make(name)
            return dg.MaterializeResult(data_version=dg.DataVersion(content))

        return asset

    def _check(self, name: str) -> dg.AssetChecksDefinition:
        @dg.asset_check(asset=name, name=CHECK, blocking=True)
        def holds() -> dg.AssetCheckResult:
            if f"check of {name}" in self.broken:
                raise Broken(name)
            return dg.AssetCheckResult(passed=name not in self.failing)

        return holds

    def _make(self, name: str) -> str:
        self.started.append(name)
        inputs = [self.contents[upstream] for upstream in self.reads[name]]
        found = self.outside.get(name, "")
        if name in self.meanwhile:
            self.meanwhile.pop(name)()
        if name in self.broken:
            raise Broken(name)
        key = content_key(name, self.code.get(name, "1"), found, inputs)

        def compute(keys: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
            self.computed.append(name)
            yield keys[0], {"content": self._content(name, inputs, found)}

        kept = compute_missing(self._store, name, [key], compute)
        self.contents[name] = str(kept[key]["content"])
        return self.contents[name]

    def _content(self, name: str, inputs: Sequence[str], found: str | None = None) -> str:
        if not self.reads[name]:
            return self.outside[name] if found is None else found
        code = self.code.get(name, "")
        content = f"{name}{code}({' '.join(inputs)})"
        return self.shown.get(name, str)(content)
