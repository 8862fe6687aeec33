"""Where a model lies, and which one it is.

What belongs here: finding a model's directory (local, or from the Hugging Face hub), its
fingerprint, and on what device and in what precision models run. What does not: the models
themselves (`captioner`, `sampler`, `metrics`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posterpipe.core.errors import first_line
from posterpipe.core.files import sha256_of
from posterpipe.core.store import content_key
from posterpipe.setting_types import Precision
from posterpipe.settings import ModelRef

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

COMMIT = re.compile(r"[0-9a-f]{40}")

HUB_SECONDS = 5.0
"""How long the hub may take to answer before it counts as not reachable."""

HUB_FILES = ["*.json", "*.txt", "*/*.safetensors", "model*.safetensors", "README.md"]
"""Configurations, tokenizers, safetensors and the card, which names the licence; never pickles, and
of Stable Diffusion repositories not the single-file copies at the top, which repeat the parts."""

HUB_SKIPPED = ["*.fp16.*", "*.non_ema.*", "*non_ema*", "safety_checker/*", "*openvino*", "*onnx*"]

NOT_THE_MODEL = (".md", ".png", ".jpg", ".csv", ".parquet", ".jsonl", ".log")
"""Files beside a model that change nothing it does."""

EXPORTS_NAME = "exports"
"""The folder of a checkpoint with the models from the middle of its training."""

FINGERPRINT_LENGTH = 12


class ModelMissing(Exception):
    """A model cannot be had. The message is one sentence with the remedy."""


def locate(ref: ModelRef, root: Path) -> Path:
    """The directory that `from_pretrained` reads.

    `ref.id` is a directory (absolute, or relative to `root`) or a hub id, which is taken from the
    local cache, or else downloaded. Raises ModelMissing with the remedy.
    """
    folder = _directory(ref, root)
    if folder is None:
        return _from_hub(ref)
    if not folder.is_dir():
        raise ModelMissing(
            f"The model directory {folder} is not there: restore it (`git checkout -- {ref.id}` "
            "for a model of this project), or name another directory or hub id in the profile"
        )
    if not _complete(folder):
        raise ModelMissing(
            f"The model directory {folder} is not complete (a configuration and *.safetensors are "
            "needed): copy it again, or name another directory or hub id in the profile"
        )
    return folder


def fingerprint(ref: ModelRef, root: Path) -> str:
    """12 hex digits that change when the model's weights, configuration or tokenizer change.

    A directory is known by the content of its files, a hub model by its id and commit (see
    `commit_of`). Raises ModelMissing.
    """
    if _directory(ref, root) is None:
        return content_key("hub", ref.id, commit_of(ref))[:FINGERPRINT_LENGTH]
    return directory_fingerprint(locate(ref, root))


def known_fingerprint(ref: ModelRef, root: Path) -> str | None:
    """As `fingerprint`, without network: None where that takes a download, and for a directory
    that is missing."""
    if _directory(ref, root) is None and not is_pinned(ref) and cached_snapshot(ref) is None:
        return None
    try:
        return fingerprint(ref, root)
    except ModelMissing:
        return None


def joint_fingerprint(fingerprints: Iterable[str]) -> str:
    """One fingerprint for several models together; that of the model where there is but one."""
    different = list(dict.fromkeys(fingerprints))
    if len(different) == 1:
        return different[0]
    return content_key("models", different)[:FINGERPRINT_LENGTH]


def revision_of(ref: ModelRef, root: Path) -> str:
    """What exactly a model is: the commit of a hub model, the fingerprint of a directory. Raises
    ModelMissing."""
    return commit_of(ref) if _directory(ref, root) is None else fingerprint(ref, root)


def commit_of(ref: ModelRef) -> str:
    """The commit of a hub model: the one that is named, or else that of the snapshot that
    `locate` gives, downloaded where it is not there. A branch moves, and what was made with the
    weights before is not to be taken for what the new ones make. Raises ModelMissing."""
    return str(ref.revision) if is_pinned(ref) else _from_hub(ref).name


def is_pinned(ref: ModelRef) -> bool:
    """Whether a hub model's revision is a whole commit hash, the one name that never moves."""
    return COMMIT.fullmatch(ref.revision or "") is not None


def is_on_hub(ref: ModelRef, root: Path) -> bool:
    """Whether a reference means a model of the hub, and no directory."""
    return _directory(ref, root) is None


def cached_snapshot(ref: ModelRef) -> Path | None:
    """The whole snapshot of a hub model in the local cache, in a folder named by its commit; None
    where there is none. Asks no network."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        snapshot = huggingface_hub.snapshot_download(
            ref.id, revision=ref.revision, local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, ValueError, OSError):
        return None
    return Path(snapshot) if _complete(Path(snapshot)) else None


def directory_fingerprint(folder: Path) -> str:
    """12 hex digits of the content of a model directory, pictures, notes and the models from the
    middle of its training left out."""
    files = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        beside = relative.parts[0] == EXPORTS_NAME
        if hidden or beside or path.suffix in NOT_THE_MODEL or not path.is_file():
            continue
        stats = path.stat()
        digest = _file_digest(str(path), stats.st_size, stats.st_mtime_ns, stats.st_ino)
        files.append((relative.as_posix(), digest))
    return content_key("directory", files)[:FINGERPRINT_LENGTH]


@lru_cache(maxsize=1024)
def _file_digest(path: str, size: int, mtime_ns: int, inode: int) -> str:
    return sha256_of(path)


def _directory(ref: ModelRef, root: Path) -> Path | None:
    """The directory that a reference means, there or not; None for a hub id."""
    path = root / Path(ref.id).expanduser()
    if path.is_dir() or not HUB_ID.fullmatch(ref.id):
        return path
    # `models/foo` beside an existing folder `models` is a directory that is missing.
    return path if path.parent.is_dir() and path.parent != root else None


def _complete(folder: Path) -> bool:
    index = folder / "model_index.json"
    if not index.is_file():
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:
        return False
    weights = ("unet", "vae", "text_encoder")
    return all(any((folder / part).glob("*.safetensors")) for part in weights if parts.get(part))


def _from_hub(ref: ModelRef) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    quiet_hub()
    cached = cached_snapshot(ref)
    if cached is not None:
        return cached
    which = ref.id + (f" (revision {ref.revision})" if ref.revision else "")
    remedy = (
        f"connect, or run `hf download {ref.id}` on a machine that is connected and copy its "
        "cache, or choose POSTERPIPE_PROFILE=starter"
    )
    if not _hub_answers():
        raise ModelMissing(
            f"The profile needs the model {which} from the Hugging Face hub, and the hub cannot "
            f"be reached: {remedy}"
        )
    try:
        snapshot = huggingface_hub.snapshot_download(
            ref.id,
            revision=ref.revision,
            etag_timeout=HUB_SECONDS,
            allow_patterns=HUB_FILES,
            ignore_patterns=HUB_SKIPPED,
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelMissing(
            f"The Hugging Face hub has no model {which} that this account may read: correct its "
            "id or revision in the profile, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # the network fails in many ways
        raise ModelMissing(
            f"The profile needs the model {which} from the Hugging Face hub, and the download "
            f"failed ({first_line(error)}): {remedy}"
        ) from error
    if not _complete(Path(snapshot)):
        raise ModelMissing(
            f"The model {which} on the Hugging Face hub has no safetensors weights: name a "
            "revision that has them in the profile, since pickled weights are never loaded"
        )
    return Path(snapshot)


def _hub_answers() -> bool:
    """Whether the hub answers at all, asked once: the download itself tries again for minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    import httpx

    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except httpx.HTTPError:
        return False
    return True


def quiet_hub() -> None:
    """Keep the hub's and transformers' routine messages out of the log."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("huggingface_hub", "httpx", "transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def best_device() -> torch.device:
    """The accelerator of this machine, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def usable_precision(
    precision: Precision | Literal["auto"], device: torch.device | None = None
) -> Precision:
    """The precision in which a device computes, the best one of this machine where none is named.

    fp16 becomes fp32 on CPUs, which compute it slowly, or not at all. `auto`: bf16 where the
    hardware has units for it, fp16 on GPUs without, else fp32. Of x86 CPUs those with AMX count.
    AVX-512's bf16 instructions alone do not: on a Xeon with them and without AMX, BLIP-sized
    products took as long in bf16 as in fp32, or longer.
    """
    if precision == "fp32" or precision == "bf16":
        return precision  # asked first, since importing torch costs seconds
    import torch

    device = device or best_device()
    if precision == "fp16":
        return "fp32" if device.type == "cpu" else "fp16"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


# Errors after which CUDA answers every call of the process with the same error, and ROCm's.
_DEVICE_IS_GONE = re.compile(
    r"illegal memory access|illegal instruction|illegal address|misaligned address"
    r"|invalid program counter|device-side assert|unspecified launch failure|launch timed out"
    r"|hardware stack error|uncorrectable|device is lost|fallen off the bus",
    re.IGNORECASE,
)


def device_is_gone(error: BaseException, device: torch.device) -> bool:
    """Whether nothing can be computed on a device any more in this process, after `error`.

    Too little memory does not count: less at once may fit.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, RuntimeError) and _DEVICE_IS_GONE.search(str(error)):
        return True
    if device.type == "cpu":
        return False
    try:
        return float(torch.ones(1, device=device).sum()) != 1.0
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as asked:
        return "out of memory" not in str(asked)


class DeviceGone(Exception):
    """The accelerator can no longer be used by this process. What was done by then is kept."""


@contextlib.contextmanager
def noticing_a_gone_device(user: str, device: torch.device) -> Iterator[None]:
    """While inside, an error after which a device is gone comes out as DeviceGone; others as they
    are. `user`: what computes on the device, for people."""
    try:
        yield
    except DeviceGone:
        raise
    except Exception as error:
        if not device_is_gone(error, device):
            raise
        raise DeviceGone(
            f"{user} can no longer use its device ({first_line(error)}); what was done is kept: "
            "start it again, in a new process, and look at the machine where that fails as well"
        ) from error


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch type of a precision setting."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def computing_in(
    precision: Precision, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """What a model is called in. On a CPU the weights are fp32 whatever the precision is, and bf16
    is what is computed in while inside; on a GPU the weights themselves are short. fp32 is fp32 on
    both."""
    import torch

    if precision == "fp32":
        return whole_fp32()
    if device.type == "cpu" and precision == "bf16":
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def whole_fp32() -> Iterator[None]:
    """While inside, convolutions and products on a GPU are fp32 as it is called, and the same each
    time. From Ampere on, cuDNN takes TF32 of ten bits for it unless it is told otherwise, and the
    rest does where the setting `tf32` asks for it.

    The switches are those of the process: of several threads inside, the last one to leave sets
    them back.
    """
    import torch

    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    with _switching:
        _before.append(
            (cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark)
        )
        cudnn.allow_tf32 = products.allow_tf32 = False
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        with _switching:
            before = _before.pop()  # of the last one to leave it is the first one's
            if not _before:
                cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


_switching = threading.Lock()
_before: list[tuple[bool, bool, bool, bool]] = []
"""What the switches were when each of those inside came in."""


def give_memory_back(freed: weakref.ref[Any] | None = None) -> None:
    """Returns to the system what models took that are no longer needed.

    Python's collector counts objects and not gigabytes, so a model in a cycle of references stays
    for long; and weights that were freed stay with the C library in pieces, 6 GB of them after
    Stable Diffusion 2.1 had drawn in fp32, or with CUDA's allocator. What runs next, a training
    process for one, needs them.

    `freed`: what should be gone by now. The collector looks at every object of the process, so it
    is not asked where this is gone indeed.
    """
    if freed is None or freed() is not None:
        gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
