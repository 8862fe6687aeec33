"""What `posterpipe doctor` finds out about a machine.

What belongs here: looking at hardware, packages, models, disk and network without changing any of
them. What does not: installing (the Makefile) and fetching models (`core.models`).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from huggingface_hub.constants import ENDPOINT
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from posterpipe.core.files import has_symbolic_links
from posterpipe.core.parallel import cores
from posterpipe.home import HomeError, home_of
from posterpipe.settings import ModelRef, Settings, load_settings

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "dagster",
    "dagster-webserver",
    "dagster-dbt",
    "dbt-core",
    "dbt-duckdb",
    "duckdb",
    "pandas",
    "pillow",
)
HUB = ENDPOINT
"""Where models come from; the variable HF_ENDPOINT names a mirror."""
HUB_SECONDS = 3.0
"""How long the hub may take to answer."""
LANDING_SECONDS = 20.0
"""How long the landing place may take to list its posters."""
DISK_GB = {"local": 2, "hub": 40}
"""Free space needed with local models, and with those of the hub and their checkpoints."""
HUB_MEMORY_GB = 24
"""Memory that fine-tuning Stable Diffusion 2.1 takes on a CPU."""
HUB_PARAMETERS = {"unet": 866_000_000, "text_encoder": 340_000_000}
"""Of Stable Diffusion 2.1."""


@dataclass(frozen=True)
class Finding:
    """One line: `ok`, `note` (works, but could be better), or `missing` (does not work)."""

    state: Literal["ok", "note", "missing"]
    subject: str
    text: str


def run_doctor() -> int:
    """Print the findings; 1 if something that is needed is missing, else 0."""
    settings = load_settings()
    console = Console(emoji=False)
    table = Table.grid("", "", Column(overflow="fold"), padding=(0, 2))
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    found = list(examine(settings))
    for finding in found:
        # Paths contain brackets now and then, which rich would take for markup.
        table.add_row(marks[finding.state], escape(finding.subject), escape(finding.text))
    profile = escape(settings.profile)
    console.print(f"posterpipe {_installed('posterpipe') or '?'}, profile {profile}")
    console.print(table)
    missing = [finding for finding in found if finding.state == "missing"]
    if missing:
        console.print(f"[red]{len(missing)} missing.[/] See the lines above for what to do.")
        return 1
    console.print("[green]Everything that this profile needs is here.[/]")
    return 0


def examine(settings: Settings) -> Iterator[Finding]:
    """The findings, cheapest first."""
    yield _python()
    yield from _packages()
    yield from _devices(settings)
    yield _memory(settings)
    yield _store(settings)
    yield from _home(settings)
    yield _disk(settings)
    yield _posters(settings)
    yield _suite(settings)
    yield _reports(settings)
    for name, ref in _models(settings).items():
        yield _model(name, ref, settings)
    yield _hub(_uses_hub(settings), _absent(settings))


def _python() -> Finding:
    return Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    wanted = {}
    for requirement in requires("posterpipe") or [] if _installed("posterpipe") else []:
        match = re.fullmatch(r"([A-Za-z0-9_-]+)==([^;\s]+)", requirement)
        if match:
            wanted[match[1].lower()] = match[2]
    if not wanted:
        yield Finding("note", "posterpipe", "not installed as a package; run `make install`")
    right = []
    for name in PACKAGES:
        have, want = _installed(name), wanted.get(name)
        if have is None:
            yield Finding("missing", name, "not installed; run `make install`")
        elif want and have.split("+")[0] != want:
            yield Finding("note", name, f"{have}, tested with {want}; run `make install`")
        else:
            right.append(f"{name} {have}")
    yield Finding("ok", "packages", ", ".join(right))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices(settings: Settings) -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("missing", "devices", f"torch cannot be loaded ({error}); `make install`")
        return
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if gpus:
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
        yield Finding("ok", "devices", f"{names}; {cores()} CPU cores")
        yield from _gpu_memory(settings, min(gpu.total_memory for gpu in gpus) / 2**30)
    elif _uses_hub(settings):
        text = f"{cores()} CPU cores, no GPU: the real models train very slowly here"
        yield Finding("note", "devices", text + "; use a machine with one for this profile")
    else:
        yield Finding("ok", "devices", f"{cores()} CPU cores, no GPU (this profile needs none)")
    # On GPUs before Ampere torch emulates it, which is slow.
    bf16 = bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False)
    yield _precision(settings, bf16)


def _gpu_memory(settings: Settings, gib: float) -> Iterator[Finding]:
    """Whether a GPU of so much memory, the smallest, is too small for the training."""
    from posterpipe.core.dreambooth.memory import BESIDE_GIB, IMAGE_GIB, models_gib
    from posterpipe.core.models import is_on_hub

    if not is_on_hub(settings.base_model, settings.root):
        return
    training = settings.training
    pixels = settings.images.width * settings.images.height
    images = IMAGE_GIB * training.train_batch_size * pixels / 512**2
    needed = models_gib(training, HUB_PARAMETERS) + images + BESIDE_GIB
    if gib < needed:
        less = "" if training.gradient_checkpointing else ", less with gradient checkpointing"
        yield Finding(
            "note",
            "GPU memory",
            f"{gib:.0f} GiB; training Stable Diffusion 2.1 as set here takes about {needed:.0f} GiB"
            f'{less}: choose settings under "Little memory" in docs/training.md',
        )


def _precision(settings: Settings, gpu_bf16: bool) -> Finding:
    flags = sorted(_cpu_flags() & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})
    wanted = settings.training.mixed_precision
    if gpu_bf16:
        text = "the GPU computes bf16"
    elif _has_gpu():
        text = "the GPU computes no bf16"
    elif flags:
        text = f"the CPU computes bf16 ({', '.join(flags)})"
    else:
        text = "no bf16 in this CPU"
    if wanted == "bf16" and not gpu_bf16 and (_has_gpu() or not flags):
        faster = "fp16" if _has_gpu() else "fp32"
        remedy = f"training works but is slow; try POSTERPIPE_TRAINING__MIXED_PRECISION={faster}"
        return Finding("note", "precision", f"{text}: {remedy}")
    if wanted == "fp16" and not _has_gpu():
        remedy = "fp16 needs one; set POSTERPIPE_TRAINING__MIXED_PRECISION=bf16 or fp32"
        return Finding("note", "precision", f"{text}; no GPU: {remedy}")
    if wanted == "fp16" and gpu_bf16:
        remedy = (
            "fp16 can overflow with Stable Diffusion 2.1; set "
            "POSTERPIPE_TRAINING__MIXED_PRECISION=bf16 and POSTERPIPE_SAMPLER__PRECISION=bf16"
        )
        return Finding("note", "precision", f"{text}: {remedy}")
    return Finding("ok", "precision", f"{text}; training uses {wanted}")


def _has_gpu() -> bool:
    try:
        import torch
    except (ImportError, OSError):
        return False  # told by `_devices`
    return torch.cuda.is_available()


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(match[1].split()) if match else set()


def _memory(settings: Settings) -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return Finding("note", "memory", "this system does not tell how much there is")
    if _uses_hub(settings) and total < HUB_MEMORY_GB - 1 and not _has_gpu():
        text = f"{total:.0f} GiB; the real models want {HUB_MEMORY_GB} GiB without a GPU"
        return Finding("note", "memory", f"{text}: choose POSTERPIPE_PROFILE=starter")
    return Finding("ok", "memory", f"{total:.0f} GiB")


def _store(settings: Settings) -> Finding:
    store = settings.path(settings.store)
    # Looking must not create the store: its nearest folder that exists is tried.
    folder = _existing(store)
    try:
        store.exists()  # raises for a path that cannot be
        with tempfile.TemporaryFile(dir=folder):
            pass
        links = has_symbolic_links(folder)
    except OSError as error:
        remedy = "make it writable or choose another one with POSTERPIPE_STORE"
        return Finding("missing", "store", f"{folder}: cannot be written ({error}); {remedy}")
    if not links:
        text = f"{folder}: the file system has no symbolic links, which a publication needs"
        return Finding("missing", "store", f"{text}; choose another one with POSTERPIPE_STORE")
    return Finding("ok", "store", f"{store} can be written")


def _home(settings: Settings) -> Iterator[Finding]:
    try:
        home_of(settings.root)
    except HomeError as error:
        yield Finding("missing", "history", str(error))


def _disk(settings: Settings) -> Finding:
    folder = _existing(settings.path(settings.store))
    free = shutil.disk_usage(folder).free / 1e9
    needed = DISK_GB["hub" if _uses_hub(settings) else "local"]
    if free < needed:
        text = f"{free:.0f} GB free at {folder}, {needed} GB are needed"
        return Finding("missing", "disk", f"{text}; make room or set POSTERPIPE_STORE elsewhere")
    return Finding("ok", "disk", f"{free:.0f} GB free")


def _existing(path: Path) -> Path:
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def _posters(settings: Settings) -> Finding:
    from posterpipe.core.posters.landing import EXTENSIONS
    from posterpipe.core.posters.listing import PlaceMissing, entries_within, open_place

    place = open_place(settings.landing, settings.root)
    try:
        entries = entries_within(place, LANDING_SECONDS)
        count = sum(entry.name.lower().endswith(EXTENSIONS) for entry in entries)
    except PlaceMissing as error:
        return Finding("missing", "posters", str(error))
    needed = settings.checks.min_posters
    if count < needed:
        text = f"{count} in {place.location}, at least {needed} are needed"
        return Finding("missing", "posters", f"{text}; put some in, or set POSTERPIPE_LANDING")
    return Finding("ok", "posters", f"{count} in {place.location}")


def _suite(settings: Settings) -> Finding:
    from posterpipe.core.prompts import PromptSuiteError, load_suite, shared_seeds
    from posterpipe.core.sampler import known_text_limit

    path = settings.path(settings.prompt_suite)
    try:
        limit = known_text_limit(settings.base_model, settings.root)
    except (ImportError, OSError):
        limit = None  # what cannot be loaded is told by `_packages` and `_devices`
    try:
        prompts = load_suite(path, limit=limit, sampler=settings.sampler)
    except PromptSuiteError as error:
        return Finding("missing", "prompts", str(error))
    images = sum(len(prompt.seeds) for prompt in prompts)
    told = f"{len(prompts)} in {path}, {images} images a variant"
    shared = shared_seeds({prompt.prompt_id: prompt.seeds for prompt in prompts})
    if shared:
        seed, names = next(iter(shared.items()))
        what = f"{names[0]} and {names[1]} share the seed {seed}"
        return Finding(
            "note", "prompts",
            f"{told}; {what}: intervals become too narrow, give each prompt its own seeds",
        )  # fmt: skip
    return Finding("ok", "prompts", told)


def _reports(settings: Settings) -> Finding:
    manifest = settings.path(Path("dbt_like_reports/target/manifest.json"))
    if manifest.exists():
        return Finding("ok", "reports", "the dbt manifest is there")
    if not manifest.parents[1].is_dir():
        text = f"{manifest.parents[1]} is not there; run posterpipe inside its checkout"
        return Finding("missing", "reports", text)
    return Finding("note", "reports", "no dbt manifest yet; the first start takes longer")


def _models(settings: Settings) -> dict[str, ModelRef]:
    """The profile's models by what they are called here, each once."""
    named = {
        "base model": settings.base_model,
        "captioner": settings.captioner.model,
        "scorer": settings.scorer.model,
    }
    others = [ref for ref in settings.evidence.models if ref not in named.values()]
    return {**named, **{f"evidence {Path(ref.id).name}": ref for ref in others}}


def _uses_hub(settings: Settings) -> bool:
    from posterpipe.core.models import is_on_hub

    return any(is_on_hub(ref, settings.root) for ref in _models(settings).values())


def _absent(settings: Settings) -> bool:
    """Whether a model has yet to be downloaded."""
    from posterpipe.core.models import cached_snapshot, is_on_hub

    refs = [ref for ref in _models(settings).values() if is_on_hub(ref, settings.root)]
    return any(cached_snapshot(ref) is None for ref in refs)


def _model(name: str, ref: ModelRef, settings: Settings) -> Finding:
    from posterpipe.core.models import ModelMissing, cached_snapshot, is_on_hub, is_pinned, locate

    if not is_on_hub(ref, settings.root):
        try:
            return Finding("ok", name, str(locate(ref, settings.root)))
        except ModelMissing as error:
            return Finding("missing", name, str(error))
    snapshot = cached_snapshot(ref)
    here = f"{ref.id} is in the local cache"
    if snapshot is None:
        here = f"{ref.id} is not here yet; the first run downloads it"
    if is_pinned(ref):
        return Finding("ok" if snapshot else "note", name, here)
    commit = f"{snapshot.name!r}" if snapshot else "a commit hash"
    return Finding(
        "note",
        name,
        f"{here}. Its revision {ref.revision or 'main'} can move, and other weights are another "
        f"model with scores of its own: pin it in the profile with revision = {commit}",
    )


def _hub(used: bool, absent: bool) -> Finding:
    import httpx

    try:
        httpx.head(HUB, timeout=HUB_SECONDS)
    except httpx.HTTPError as error:
        text = f"{HUB} does not answer ({type(error).__name__})"
        if absent:
            remedy = "connect, or choose POSTERPIPE_PROFILE=starter"
            return Finding("missing", "hub", f"{text}, and models are missing: {remedy}")
        why = "all models are here" if used else "this profile does not need it"
        return Finding("ok", "hub", f"{text}; {why}")
    return Finding("ok", "hub", f"{HUB} answers")
