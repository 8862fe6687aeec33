"""The code and the packages that something was made with.

What belongs here: finding them out, and their record. What does not: which step ran with them
(`records`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from posterpipe.core.store import Store, content_key
from posterpipe.settings import default_root

ENVIRONMENT = "environment"

PACKAGES = (
    "dagster", "torch", "diffusers", "transformers", "tokenizers", "accelerate", "bitsandbytes",
    "safetensors", "numpy", "pandas", "pyarrow", "pillow", "duckdb",
)  # fmt: skip
"""Packages whose version may show in a result."""


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """The code that runs here: posterpipe (version), source (hash of its Python files), commit (""
    outside of a checkout), python, platform, packages (name to version)."""
    return {
        "posterpipe": package_version("posterpipe"),
        "source": _source_hash(),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}".lower(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def record_environment(store: Store) -> str:
    """Writes down the code that runs here; its id, 16 hex digits."""
    values = environment()
    environment_id = content_key(ENVIRONMENT, values)[:16]
    store.add_results(ENVIRONMENT, {environment_id: values})
    return environment_id


def package_version(package: str) -> str | None:
    """The version that is installed; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_hash() -> str:
    package = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(package).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()[:12]


def _commit() -> str:
    root = default_root()
    if not (root / ".git").exists():
        return ""  # an installed package, perhaps inside the repository of somebody else
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
