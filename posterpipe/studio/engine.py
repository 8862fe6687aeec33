"""The queue before the one model.

What belongs here: what a person asks for and when it is refused, jobs and their places, turns,
cancelling, and the one thread that asks the model. What does not: models and pixels (`painter`),
pages.

A machine has room for one model at work, so one thread speaks for it and jobs take turns: after
each poster a job goes behind those that wait, so that who asks for one poster never waits for
another one's twelve.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from posterpipe.core.errors import first_line
from posterpipe.core.memory import is_out_of_memory
from posterpipe.core.prompts import MAX_SEED

if TYPE_CHECKING:
    from posterpipe.studio.painter import Poster
    from posterpipe.studio.served import Choice

log = logging.getLogger(__name__)

MAX_DESCRIPTION = 1_000
"""Characters; the text encoders read about 400."""

MAX_TITLE = 80
"""Characters: longer ones do not fit on a poster in three lines."""

MAX_POSTERS = 12
"""Of one request."""

MOST_WAITING = 50
"""Jobs in the queue; the next one is refused."""

ABANDONED_AFTER = 60.0
"""Seconds without its page after which a job is dropped: a phone may lock for a moment."""

IDLE_SECONDS = 600.0
"""After so long without a request the models' memory is given back, to a training for one."""

State = Literal["waiting", "loading", "drawing", "done", "cancelled", "failed"]

FINISHED: frozenset[State] = frozenset({"done", "cancelled", "failed"})


class OrderRejected(ValueError):
    """What was asked for cannot be drawn. The message is a sentence for the one who asked."""


class QueueFull(RuntimeError):
    """No more jobs are taken now. The message is a sentence for the one who asked."""


class Cancelled(Exception):
    """Stops the drawing of a job that nobody waits for any more."""


@dataclass(frozen=True)
class Order:
    """What is asked for: `description` goes to the model word for word."""

    description: str
    negative: str
    title: str
    """Set in type on the poster; "" for none."""
    style: str
    """Of the lettering: `auto` or a name of `typography.STYLES`."""
    seeds: tuple[int, ...]
    choices: tuple[Choice, ...]
    """The models; each draws every seed."""

    @property
    def posters(self) -> int:
        """How many posters that makes."""
        return len(self.seeds) * len(self.choices)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def one_line(text: str) -> str:
    """A text in Unicode's composed form, control characters and runs of spaces as one space."""
    return " ".join(_CONTROL.sub(" ", unicodedata.normalize("NFC", text)).split())


def take_order(
    *,
    description: str,
    choices: Sequence[Choice],
    negative: str = "",
    title: str = "",
    style: str = "auto",
    count: int = 1,
    seed: int | None = None,
) -> Order:
    """An order from what was typed. Raises OrderRejected.

    `seed`: of the first poster, the next ones count up; none: any.
    """
    description, negative, title = one_line(description), one_line(negative), one_line(title)
    if not description:
        raise OrderRejected("Describe the poster first: what it shows, in a sentence.")
    for what, text, most in (
        ("description", description, MAX_DESCRIPTION),
        ("negative prompt", negative, MAX_DESCRIPTION),
        ("title", title, MAX_TITLE),
    ):
        if len(text) > most:
            raise OrderRejected(
                f"The {what} has {len(text)} characters, and at most {most} fit; shorten it."
            )
    if title and not any(sign.isalnum() for sign in title):
        raise OrderRejected("The title has no letters; write one, or leave it empty.")
    if not 1 <= count <= MAX_POSTERS:
        raise OrderRejected(f"Between 1 and {MAX_POSTERS} posters can be made at once.")
    if not choices:
        raise OrderRejected("No model is chosen; choose one.")
    if seed is None:
        seed = random.SystemRandom().randrange(MAX_SEED)
    if not 0 <= seed <= MAX_SEED:
        raise OrderRejected(f"The seed is a whole number from 0 to {MAX_SEED}; change it.")
    seeds = tuple((seed + i) % (MAX_SEED + 1) for i in range(count))
    return Order(description, negative, title, style, seeds, tuple(choices))


class Paints(Protocol):
    """Who draws: `painter.Painter`, in this process or another (`worker`)."""

    def ready(self, choice: Choice) -> bool:
        """Whether the model is loaded."""
        ...

    def prepare(self, choice: Choice) -> None:
        """Load the model."""
        ...

    def paint(
        self, order: Order, choice: Choice, seed: int, on_step: Callable[[int, int], None]
    ) -> Poster:
        """One poster; `on_step(done, total)` after each step, and what it raises stops it."""
        ...

    def close(self) -> None:
        """Give memory back; what is asked for later loads its model anew."""
        ...


@dataclass
class Job:
    """An order on its way. Only the engine changes it; pages read it with `Engine.look`."""

    number: int
    owner: str
    order: Order
    alive: Callable[[], bool]
    state: State = "waiting"
    posters: list[Poster] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Sentences about what went wrong, a poster each."""
    step: int = 0
    steps: int = 0
    """Of the poster that is being drawn."""
    started: float | None = None
    seconds_a_step: float = 0.0
    cancelling: bool = False
    seen: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Posters that are drawn or have failed."""
        return len(self.posters) + len(self.problems)


@dataclass(frozen=True)
class View:
    """A job at one moment."""

    state: State
    before: int
    """Jobs that come before its next poster."""
    posters: tuple[Poster, ...]
    problems: tuple[str, ...]
    total: int
    step: int
    steps: int
    seconds_left: float | None
    """Of drawing, the turns of others left out; None where it is not known."""

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.state in FINISHED

    @property
    def share(self) -> float:
        """How much of the job is done, 0 to 1."""
        within = self.step / self.steps if self.steps else 0.0
        done = len(self.posters) + len(self.problems)
        return min(1.0, (done + within) / max(1, self.total))


class _Stop:
    """Nobody needs the thread any more."""


class _Idle:
    """Nobody asked for anything for a while: memory is given back."""


@dataclass(frozen=True)
class _Load:
    """A model is loaded before somebody asks for a poster of it."""

    choice: Choice


@dataclass(frozen=True)
class _Turn:
    """The next poster of a job is drawn."""

    job: Job


class Engine:
    """Takes orders and has them drawn, one poster at a time, in a thread of its own."""

    def __init__(self, painter: Paints, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._painter = painter
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._wanted: Choice | None = None
        """A model to load while nobody waits."""
        self._loading_ahead = False
        self._warmed: set[str] = set()
        self._numbers = itertools.count(1)
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- for pages --------------------------------------------------------------------------------

    def submit(self, order: Order, owner: str, alive: Callable[[], bool] = lambda: True) -> Job:
        """Puts an order into the queue. `owner` names a visit; `alive` tells whether its page is
        still there. Raises QueueFull."""
        with self._changed:
            jobs = [*self._waiting, *([self._current] if self._current else [])]
            if any(job.owner == owner and not job.cancelling for job in jobs):
                raise QueueFull("Your last request is still being drawn; wait for it or cancel it.")
            if len(self._waiting) >= MOST_WAITING:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting already; try again in a while."
                )
            job = Job(next(self._numbers), owner, order, alive, seen=self._clock())
            self._waiting.append(job)
            self._awake()
            return job

    def warm(self, choice: Choice) -> None:
        """Has a model loaded while nothing is asked for, so that the first poster comes soon.

        Once each, until memory is given back: what people ask for decides which models stay there.
        """
        with self._changed:
            idle = self._current is None and not self._waiting
            if idle and choice.name not in self._warmed:
                self._warmed.add(choice.name)
                self._wanted = choice
                self._awake()

    def cancel(self, job: Job) -> None:
        """Stops a job at its next step; what is drawn stays."""
        with self._changed:
            job.cancelling = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.state = "cancelled"
            self._changed.notify_all()

    def look(self, job: Job) -> View:
        """How far a job is."""
        with self._changed:
            before = 0
            if job in self._waiting:
                before = self._waiting.index(job) + (self._current is not None)
            left: float | None = None
            if job.seconds_a_step and job.steps:
                steps = job.steps * (job.order.posters - job.done) - job.step
                left = max(0.0, steps * job.seconds_a_step)
            state = job.state
            if state == "waiting" and before == 0 and self._loading_ahead:
                state = "loading"
            return View(
                state, before, tuple(job.posters), tuple(job.problems), job.order.posters,
                job.step, job.steps, left,
            )  # fmt: skip

    def wait(self, job: Job, seconds: float) -> View:
        """The job when it is finished, or after so many seconds."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while job.state not in FINISHED and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
        return self.look(job)

    def waiting(self) -> int:
        """Jobs in the queue, the one being drawn included."""
        with self._changed:
            return len(self._waiting) + (self._current is not None)

    def close(self) -> None:
        """Ends the thread, cancelling what is under way."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *([self._current] if self._current else [])]:
                job.cancelling = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout=30)
        self._painter.close()

    # -- the thread -------------------------------------------------------------------------------

    def _awake(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            # A daemon, so that the server's end is not held up by a poster.
            self._thread = threading.Thread(target=self._work, name="studio", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        loaded = False
        while True:
            task = self._next(IDLE_SECONDS if loaded else None)
            match task:
                case _Stop():
                    return
                case _Idle():
                    self._painter.close()
                case _Load(choice):
                    self._load_ahead(choice)
                case _Turn(job):
                    self._end_turn(job, self._turn(job))
            loaded = not isinstance(task, _Idle)

    def _next(self, patience: float | None) -> _Stop | _Idle | _Load | _Turn:
        """What is to be done next, waited for; `_Idle` after so many seconds without anything."""
        with self._changed:
            asked = self._changed.wait_for(
                lambda: bool(self._waiting or self._wanted or self._closed), patience
            )
            if self._closed:
                for left in self._waiting:
                    left.state = "cancelled"
                self._waiting.clear()
                self._changed.notify_all()
                return _Stop()
            if not asked:
                self._warmed.clear()
                return _Idle()
            wanted, self._wanted = self._wanted, None
            if self._waiting:
                self._current = self._waiting.popleft()
                return _Turn(self._current)
            assert wanted is not None
            self._loading_ahead = True
            return _Load(wanted)

    def _load_ahead(self, choice: Choice) -> None:
        try:
            self._painter.prepare(choice)
        except Exception:
            # Who asks for a poster is told; here nobody has asked.
            log.warning("the model %s could not be loaded ahead", choice.name, exc_info=True)
        with self._changed:
            self._loading_ahead = False

    def _turn(self, job: Job) -> State:
        """One poster of a job; the state it has afterwards."""
        order = job.order
        seed, choice = [(s, c) for s in order.seeds for c in order.choices][job.done]
        try:
            self._check(job)
            if not self._painter.ready(choice):
                self._say(job, "loading")
                self._painter.prepare(choice)
                self._check(job)
            self._say(job, "drawing")
            job.started = self._clock()
            poster = self._painter.paint(
                order, choice, seed, lambda step, steps: self._step(job, step, steps)
            )
        except Cancelled:
            return "cancelled"
        except Exception as error:
            # One request that fails must not take the studio with it.
            log.warning("request %d failed", job.number, exc_info=True)
            with self._changed:
                job.problems.append(sentence(error))
            if not job.posters and job.done == 1:
                return "failed"  # the others would fail alike
        else:
            with self._changed:
                job.posters.append(poster)
        if job.done < order.posters:
            return "cancelled" if job.cancelling else "waiting"
        return "done" if job.posters else "failed"

    def _end_turn(self, job: Job, state: State) -> None:
        with self._changed:
            self._current = None
            job.step = 0
            job.state = state
            if state not in FINISHED:
                self._waiting.append(job)
            self._changed.notify_all()

    def _say(self, job: Job, state: State) -> None:
        with self._changed:
            job.state = state
            self._changed.notify_all()

    def _step(self, job: Job, step: int, steps: int) -> None:
        with self._changed:
            job.step, job.steps = step, steps
            if job.started is not None and step:
                job.seconds_a_step = (self._clock() - job.started) / step
            self._changed.notify_all()
        self._check(job)

    def _check(self, job: Job) -> None:
        """Raises Cancelled where nobody waits for the job any more."""
        now = self._clock()
        if job.alive():
            job.seen = now
        if job.cancelling or now - job.seen > ABANDONED_AFTER:
            raise Cancelled


def sentence(error: BaseException) -> str:
    """An error as a sentence for the one who asked."""
    text = first_line(error)
    if type(error).__module__.split(".")[0] == "posterpipe":
        text = text[:1].upper() + text[1:]
        return text if text.endswith((".", "!", "?")) else f"{text}."
    if is_out_of_memory(error):
        return (
            "The machine has not enough memory for this poster now; wait a minute and try again, "
            "or ask whoever runs the studio."
        )
    return (
        f"The model failed ({type(error).__name__}: {text[:200]}); try again, and choose another "
        "model if it happens twice. The server's log tells more."
    )
