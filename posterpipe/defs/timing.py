"""When each asset runs, said in its description.

What belongs here: the sentence that follows from the graph and the settings, and what is said of
settings that give no time. What does not: the rules themselves (`automation`, `arrivals`,
`retraining`, `sweep`).
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import dagster as dg

from posterpipe.defs.arrivals import ROOTS
from posterpipe.defs.automation import ON_SCHEDULE, follows_its_inputs
from posterpipe.settings import Settings, SettingsError

SOURCES = {
    "raw_posters": "the folder or bucket of posters",
    "holdout_posters": "the folder of held-out posters",
    "human_captions": "a text file beside a poster, or the CSV of captions,",
    "prompt_suite": "the file of the prompt suite",
}
"""What a change of makes each of ROOTS due."""


@contextlib.contextmanager
def cron_of(setting: str, cron: str) -> Iterator[None]:
    """Around the making of a schedule. Raises SettingsError, naming the setting, where its value is
    no cron schedule."""
    try:
        yield
    except dg.DagsterInvalidDefinitionError as error:
        raise SettingsError(
            f"{setting}: {cron!r} is no cron schedule; write minute, hour, day, month and weekday, "
            "such as 0 2 * * *"
        ) from error


def described(
    assets: Iterable[Any],
    settings: Settings,
    jobs: Sequence[Any],
) -> list[Any]:
    """The assets with a sentence in their description that says when they run."""
    assets = list(assets)
    members = {
        job.name: {key.to_user_string() for key in job.selection.resolve(assets)} for job in jobs
    }

    def spec_with_timing(spec: dg.AssetSpec) -> dg.AssetSpec:
        name = spec.key.to_user_string()
        in_jobs = [f"`{job}`" for job, names in members.items() if name in names]
        by_hand = f" The jobs {_listed(in_jobs)} make it as well." if in_jobs else ""
        timing = f"**When it runs:** {_when(spec, settings)}.{by_hand}"
        return spec.replace_attributes(
            description=f"{(spec.description or '').strip()}\n\n{timing}"
        )

    return list(dg.map_asset_specs(spec_with_timing, assets))


def _when(spec: dg.AssetSpec, settings: Settings) -> str:
    name = spec.key.path[-1]
    automation = settings.automation
    if name in ROOTS:
        return (
            f"soon after {SOURCES[name]} changed; the sensor `arrivals` looks every "
            f"{automation.sensor_interval_seconds} seconds"
        )
    if name in ON_SCHEDULE:
        return (
            f"on the schedule `training` (`{automation.training_cron}`, "
            f"{automation.training_timezone}), if enough changed since the last time"
        )
    if follows_its_inputs(spec):
        inputs = _listed(sorted(f"`{dep.asset_key.to_user_string()}`" for dep in spec.deps))
        return f"by itself when {inputs} changed, or its code or settings did (`automation`)"
    return "by itself when it is missing, or its code or settings changed (`stale_sweep`)"


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
