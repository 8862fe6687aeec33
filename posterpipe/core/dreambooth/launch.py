"""The command line that trains in a process of its own.

What belongs here: how `accelerate launch` is called, and which of its processes speaks. What does
not: who calls it (the Dagster layer), what then runs (`__main__`, `train`).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from posterpipe.core.parallel import cores

_CONFIG = Path(__file__).with_name("accelerate.yaml")
_FIRST_SPEAKS_SECONDS = 5.0

STOPPING_SECONDS = 900
"""How long whoever asks a training to stop waits for it: it makes some steps until its processes
have agreed, and writes a save of many gigabytes."""

_TORCH_WAITS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def launch_command(
    config: Path,
    *,
    module: str = "posterpipe.core.dreambooth",
    processes: int = 1,
    cpu: bool = False,
) -> list[str]:
    """`accelerate launch -m module --config config`, with this Python.

    processes: one a GPU; with `cpu` one in all, since accelerate starts several only through MPI
    (torch's own launcher, `torch.distributed.run`, does it with ACCELERATE_USE_CPU=true). Every
    choice is given, and a config file of our own, so that one of accelerate in the user's home
    changes nothing: for one process, options alone cannot say that it is no FSDP or DeepSpeed.
    Raises ValueError for several processes on CPU.
    """
    if cpu and processes > 1:
        raise ValueError(f"processes is {processes}: accelerate starts one on CPU")
    # Without a number, accelerate sets OMP_NUM_THREADS to 1 and leaves the other cores idle.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // processes))
    where = ["--cpu"]  # with which accelerate reads no config file
    if not cpu:
        where = ["--config_file", str(_CONFIG), *(["--multi_gpu"] if processes > 1 else [])]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", *where),
        *("--num_processes", str(processes), "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", threads),
        *("-m", module, "--config", str(config)),
    ]


def launch_environment() -> dict[str, str]:
    """What the environment of `launch_command` has to say as well.

    Torch's launcher, which accelerate uses for several processes, kills those that have not ended
    30 seconds after it was asked to stop.
    """
    return {_TORCH_WAITS: os.environ.get(_TORCH_WAITS, str(STOPPING_SECONDS))}


def is_first_process() -> bool:
    """Whether this process is the one that speaks, of several that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def let_the_first_speak() -> None:
    """To be called before an error is printed: returns at once in the first process, in the
    others some seconds later.

    Most errors are those of all processes: then the first one has printed it and ended meanwhile,
    upon which the launcher ends the others while they wait here. One that goes on here has an error
    that is its own.
    """
    if not is_first_process():
        time.sleep(_FIRST_SPEAKS_SECONDS)
