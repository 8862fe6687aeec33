"""What `posterpipe demo` does: the whole graph in one process, with bars instead of logs.

What belongs here: choosing what to materialize, running it, showing it, timing it. What does not:
the assets (`defs`), and the Dagster UI and daemon (`make dev`), which show the same instance.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posterpipe.core.streams import dropping
from posterpipe.home import prepare_home
from posterpipe.settings import Settings, load_settings

if TYPE_CHECKING:
    import dagster as dg

    from posterpipe.defs.resources import Deployment

LOGGER = "demo"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DAGSTER_DISABLE_TELEMETRY": "1",
}


@dataclass
class Watch:
    """What happened in the runs of one demo."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By step, in the order in which they ended."""
    groups: dict[str, str] = field(default_factory=dict)
    """Group of each step that makes assets."""
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    interrupted: bool = False


def run_demo(timings: Path | None = None) -> int:
    """Materialize what is not up to date and print the leaderboard; the exit code.

    `timings` gets the wall time by stage as JSON. The exit code is 1 where a step fails, such as on
    an empty landing folder. Raises posterpipe's own errors for a wrong setting or a missing model.
    """
    started = time.perf_counter()
    settings = load_settings()
    home = prepare_home(settings.root)
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    log = home / "demo.log"
    atexit.register(_keep_last_words, log)
    with _terminal(log) as console:
        console.print(f"[bold]posterpipe demo[/], profile {escape(settings.profile)}")
        import dagster as dg

        from posterpipe.core.progress import BarProgress
        from posterpipe.defs.dbt_reports import reports_mistake
        from posterpipe.defs.resources import Deployment

        deployment = Deployment(settings, BarProgress(console))
        require_inputs(settings)
        watch = Watch()
        try:
            with dg.DagsterInstance.from_config(str(home)) as instance:
                ok = materialize(deployment, instance, console, watch)
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
            ok, watch.interrupted = False, True
        if watch.interrupted:
            console.print("Stopped. What is done is kept: run it again to go on.")
            return INTERRUPTED
    total = time.perf_counter() - started
    if timings:
        _write_timings(timings, settings, watch, total)
    if not ok:
        for failure in watch.failures:
            print(f"posterpipe: {failure}", file=sys.stderr)
        print(f"posterpipe: the whole log is {log}", file=sys.stderr)
        return 1
    _conclude(deployment, watch, total, home)
    if mistake := reports_mistake(settings):
        print(f"posterpipe: {mistake}", file=sys.stderr)
        return 1
    return 0


def require_inputs(settings: Settings) -> None:
    """Find the models and read the prompt suite before anything costs time.

    Raises ModelMissing and PromptSuiteError.
    """
    from posterpipe.core.models import locate
    from posterpipe.core.prompts import load_suite

    refs = (settings.base_model, settings.captioner.model, settings.scorer.model)
    for ref in (*refs, *settings.evidence.models):
        locate(ref, settings.root)
    load_suite(settings.path(settings.prompt_suite), sampler=settings.sampler)


def materialize(
    deployment: Deployment, instance: dg.DagsterInstance, console: Console, watch: Watch
) -> bool:
    """Run what is stale, and everything downstream of it; whether all of it went well."""
    import dagster as dg

    from posterpipe.definitions import build_defs
    from posterpipe.defs.arrivals import ROOTS
    from posterpipe.defs.launcher import end_dead_runs, executing_runs
    from posterpipe.defs.staleness import stale_assets

    end_dead_runs(instance)
    defs = dg.Definitions.merge(
        build_defs(deployment.settings, deployment),
        dg.Definitions(loggers={LOGGER: _logger(console, watch)}),
    )
    job = defs.resolve_job_def("everything")
    specs = list(defs.resolve_all_asset_specs())
    names = [spec.key for spec in specs]
    watch.groups = {spec.key.to_user_string(): str(spec.group_name) for spec in specs}
    watch.groups["dbt_models"] = "reports"

    def run(keys: Sequence[dg.AssetKey]) -> bool:
        with executing_runs(instance) as tags:
            result = job.execute_in_process(
                instance=instance,
                asset_selection=list(keys),
                run_config={"loggers": {LOGGER: {}}},
                tags=tags,
                raise_on_error=False,
            )
        return bool(result.success)

    stale = stale_assets(specs, instance, deployment)
    roots = [dg.AssetKey(name) for name in ROOTS]
    # Where everything is to be made anyway, one run makes it. Else the roots tell first.
    if set(roots) - set(stale):
        if not run(roots):
            return False
        stale = stale_assets(specs, instance, deployment)
    chosen = _with_downstream(specs, set(stale))
    if not chosen:
        return True
    if len(chosen) < len(names):
        for key in [key for key in names if key in stale]:
            console.print(f"  {key.to_user_string()}: {escape(stale[key])}", style="dim")
    return run([key for key in names if key in chosen])


def _with_downstream(specs: Sequence[dg.AssetSpec], stale: set[dg.AssetKey]) -> set[dg.AssetKey]:
    chosen = set(stale)
    while True:
        more = {
            spec.key
            for spec in specs
            if spec.key not in chosen and any(dep.asset_key in chosen for dep in spec.deps)
        }
        if not more:
            return chosen
        chosen |= more


def _logger(console: Console, watch: Watch) -> dg.LoggerDefinition:
    """A Dagster logger that prints a line a finished step, and nothing else."""
    import dagster as dg

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            event = getattr(record, "dagster_event", None)
            if event is not None:
                _show(event, console, watch)

    @dg.logger
    def demo_logger(_: dg.InitLoggerContext) -> logging.Logger:
        logger = logging.Logger(__name__, level=logging.DEBUG)
        logger.addHandler(Handler())
        return logger

    return demo_logger


def _show(event: Any, console: Console, watch: Watch) -> None:
    from dagster import DagsterEventType

    from posterpipe.defs.alerts import reason_of

    kind = event.event_type
    if kind == DagsterEventType.STEP_SUCCESS:
        seconds = event.step_success_data.duration_ms / 1000
        watch.seconds[event.step_key] = seconds
        if event.step_key in watch.groups:  # of checks, only failures are news
            console.print(f"[green]✓[/] {event.step_key:<24} [dim]{seconds:6.1f} s[/]")
    elif kind == DagsterEventType.STEP_FAILURE:
        error = event.step_failure_data.error
        watch.interrupted |= error.cls_name == "DagsterExecutionInterruptedError"
        reason = reason_of(error)
        watch.failures.append(f"{event.step_key}: {reason}")
        console.print(f"[red]✗ {event.step_key}[/]")
    elif kind == DagsterEventType.ASSET_CHECK_EVALUATION:
        check = event.event_specific_data
        if not check.passed:
            line = f"{check.asset_key.to_user_string()}: {check.check_name} failed"
            line += f": {check.description}" if check.description else ""
            watch.warnings.append(line)
            console.print(f"[yellow]! {escape(line)}[/]")


def _keep_last_words(log: Path) -> None:
    """What libraries print while the process ends goes into the log: DuckDB lists what it did not
    free, forty lines that nobody needs below a leaderboard."""
    sys.stderr.flush()
    with suppress(OSError), open(log, "a", encoding="utf-8") as sink:
        os.dup2(sink.fileno(), 2)


@contextmanager
def _terminal(log: Path) -> Iterator[Console]:
    """A console on the terminal, while everything else that is printed goes into a file.

    Libraries, Dagster and child processes write to the descriptors 1 and 2; the console keeps a
    duplicate of the real output.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with (
        open(log, "a", encoding="utf-8") as sink,
        os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as output,
    ):
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            # A reader that goes ends no training.
            yield Console(file=dropping(output), highlight=False, emoji=False)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)


def _stages(watch: Watch) -> dict[str, float]:
    """Seconds by group of assets, checks apart."""
    stages: dict[str, float] = {}
    for step, seconds in watch.seconds.items():
        stage = watch.groups.get(step, "checks")
        stages[stage] = stages.get(stage, 0.0) + seconds
    return stages


def _write_timings(path: Path, settings: Settings, watch: Watch, total: float) -> None:
    stages = _stages(watch)
    stages["startup and bookkeeping"] = total - sum(stages.values())
    values = {
        "profile": settings.profile,
        "machine": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "total_seconds": round(total, 3),
        "stages": {name: round(seconds, 3) for name, seconds in stages.items()},
        "steps": {name: round(seconds, 3) for name, seconds in watch.seconds.items()},
    }
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _conclude(deployment: Deployment, watch: Watch, total: float, home: Path) -> None:
    """Times, the leaderboard, and where to look next."""
    from posterpipe.core.progress import duration
    from posterpipe.defs.arrivals import ROOTS

    console = Console(highlight=False, markup=False, emoji=False)
    stages = _stages(watch)
    if set(watch.seconds) & set(watch.groups) - set(ROOTS):
        times = Table("stage", "wall time", box=SIMPLE_HEAD)
        times.columns[1].justify = "right"
        for stage, seconds in stages.items():
            times.add_row(stage, f"{seconds:.1f} s")
        rest = total - sum(stages.values())
        times.add_row("startup and bookkeeping", f"{rest:.1f} s", end_section=True)
        times.add_row("total", duration(total))
        console.print(times)
    else:
        console.print(f"Everything is up to date: nothing computed, {total:.1f} s.")
    console.print(leaderboard_table(deployment))
    if control := control_line(deployment):
        console.print(control, soft_wrap=True)
    console.print(champion_line(deployment), soft_wrap=True)
    console.print(f"scores         {deployment.published_path}", soft_wrap=True)
    console.print(f"contact sheet  {deployment.contact_sheet_path}", soft_wrap=True)
    console.print(f"score report   {deployment.report_path}", soft_wrap=True)
    if home == deployment.settings.path(Path(".dagster")):
        console.print("look around    make dev, then http://127.0.0.1:3000")


def leaderboard_table(deployment: Deployment) -> Table:
    """The leaderboard of the published database, for the terminal.

    Of the scorer's own metric. Cosines are raw; differences are to `sd`, paired by prompt and seed.
    """
    import duckdb

    with duckdb.connect(str(deployment.published_path), read_only=True) as connection:
        rows = connection.execute(
            "select variant, images, blocked, prompts, mean, low_95, high_95, diff_to_sd, "
            "diff_low_95, diff_high_95, diff_prompts, metric_id from leaderboard where is_headline"
        ).fetchall()
    metrics = sorted({row[-1] for row in rows})
    table = Table(
        title="Leaderboard: mean CLIP cosine, and difference to sd paired by prompt and seed",
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("variant", overflow="fold")  # where it is narrow, the name and not a number
    for name in ("images", "cosine", "95 % interval", "difference", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for variant, images, blocked, _, mean, low, high, diff, diff_low, diff_high, _, _ in rows:
        table.add_row(
            variant,
            f"{images}" + (f" ({blocked} blocked)" if blocked else ""),
            _number(mean),
            _interval(low, high, ".3f"),
            _number(diff, "+.3f"),
            _interval(diff_low, diff_high, "+.3f"),
        )
    prompts = max((row[3] for row in rows), default=0)
    # Fewer where some prompts have no negative prompt, or no image that both could score.
    compared = min((row[-2] for row in rows if row[7] is not None), default=prompts)
    fewer = f" (of differences {compared} or more)" if compared < prompts else ""
    table.caption = (
        f"Intervals over {prompts} prompts{fewer}, seeds averaged. Metric: {', '.join(metrics)}"
    )
    return table


def control_line(deployment: Deployment) -> str:
    """The negative control of fine-tuning's difference; "" where it was not measured."""
    import duckdb

    with duckdb.connect(str(deployment.published_path), read_only=True) as connection:
        found = {
            str(kind): f"{_number(diff, '+.3f')} ({_interval(low, high, '+.3f')})"
            for kind, diff, low, high in connection.execute(
                "select split_part(metric_id, '.', 1), diff_to_sd, diff_low_95, diff_high_95 "
                "from leaderboard where variant = 'dreambooth' and diff_low_95 is not null"
            ).fetchall()
        }
    if not {"clip_control", "clip_specific"} <= found.keys():
        return ""
    return (
        "control        with the texts of the other prompts, dreambooth differs from sd by "
        f"{found['clip_control']}; own text less others: {found['clip_specific']}"
    )


def champion_line(deployment: Deployment) -> str:
    """Which checkpoint is served, and what the gate said of the newest one."""
    row = deployment.store.read_table("champion").iloc[0]
    told = {"promote": "promoted", "hold": "held", "reject": "rejected"}[str(row["decision"])]
    served = "the base model" if row["kind"] == "base" else f"checkpoint {row['checkpoint_id']}"
    pinned = ", pinned by a person" if row["pinned"] else ""
    return (
        f"champion       {served}{pinned}. The newest checkpoint {row['challenger']} is {told}: "
        f"{row['reason']}"
    )


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "–" if low is None or high is None else f"{low:{form}}…{high:{form}}"
