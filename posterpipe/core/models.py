"""Where a model lies, and which one it is.

What belongs here: finding a model's directory (local, or from the Hugging Face hub), and its
fingerprint. What does not: on what device it runs and in what precision (`devices`), and the models
themselves (`captioner`, `sampler`, `metrics`).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from posterpipe.core.errors import first_line
from posterpipe.core.files import sha256_of
from posterpipe.core.store import content_key
from posterpipe.settings import ModelRef

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
            f"The model {which} is no folder here, and the Hugging Face hub, which may have it, "
            f"cannot be reached: {remedy}"
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
            f"The model {which} is no folder here, and the Hugging Face hub has none of this name "
            "that this account may read: correct its id or revision, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # the network fails in many ways
        raise ModelMissing(
            f"The model {which} is no folder here, and its download from the Hugging Face hub "
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
    for name in ("huggingface_hub", "httpx", "transformers", "diffusers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
