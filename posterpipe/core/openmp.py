"""How torch's threads wait for each other on a CPU.

What belongs here: the one setting of OpenMP that is not left as it is. What does not: how many
threads there are, which torch and its users decide, and threads of Python (`parallel`).
"""

from __future__ import annotations

import os

SPINS = "10000"
"""Turns of a loop for which a thread waits before it sleeps; for GNU's OpenMP it is 300,000, which
are milliseconds.

Where another process takes a core away from one of the threads, the others turn that long at each
of the thousands of places in a training step where all of them meet, on the very core that it could
have. Measured on two cores beside one busy process, with the starter models: 3.5 steps of training
a second in place of 0.7, 4.8 images in place of 1.2. Alone: training as fast, images up to 6 %
slower.
"""


def wait_briefly() -> None:
    """Lets threads sleep soon; to be called before torch is imported, when the setting is read.

    A GOMP_SPINCOUNT or OMP_WAIT_POLICY of the user's own stays (GNU libgomp manual, section 4).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
