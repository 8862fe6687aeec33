"""torch's threads let go of a core that they only wait on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posterpipe.core.openmp import SPINS

ENTRIES = {
    "Dagster": "import posterpipe.definitions",
    "console": "import posterpipe.cli as entry; run(entry.main)",
    "training": "import posterpipe.core.dreambooth.__main__ as entry; run(entry.main)",
    "training for Dagster": "import posterpipe.defs.training_worker as entry; run(entry.main)",
}
RUN = """
import sys
sys.argv = ["entry", "--help"]

def run(main):
    try:
        main()
    except SystemExit:
        pass
"""


def spins(entry: str, tmp_path: Path, **environment: str) -> str:
    """For how long torch's OpenMP waits in a process that came in by this entry, as it says."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", f"{RUN}\n{entry}\nassert 'torch' not in sys.modules\nimport torch"],
        env={**inherited, **environment, "OMP_DISPLAY_ENV": "verbose",
             "POSTERPIPE_STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
    )  # fmt: skip
    said = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if said is None and done.returncode == 0:
        pytest.skip("torch has another OpenMP than GNU's here")
    assert said, done.stderr
    return said[1]


@pytest.mark.parametrize("entry", ENTRIES)
def test_threads_wait_briefly_by_whichever_way_torch_is_come_by(entry: str, tmp_path: Path) -> None:
    assert spins(ENTRIES[entry], tmp_path) == SPINS


def test_a_choice_of_the_users_own_stays(tmp_path: Path) -> None:
    entry = ENTRIES["Dagster"]
    assert spins(entry, tmp_path, GOMP_SPINCOUNT="77") == "77"
    assert spins(entry, tmp_path, OMP_WAIT_POLICY="PASSIVE") == "0"
