"""The queue before the one model: places, turns, cancelling, failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from posterpipe.core.models import ModelMissing
from posterpipe.studio import engine as engines
from posterpipe.studio.engine import Engine, Job, Order, OrderRejected, QueueFull, take_order
from posterpipe.studio.served import Choice

PATIENCE = 20.0


class HandPainter:
    """Draws a step only when it is allowed to, so that a test decides what happens when."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.drawn: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.loaded: set[str] = set()

    def ready(self, choice: Choice) -> bool:
        return choice.name in self.loaded

    def prepare(self, choice: Choice) -> None:
        self.loaded.add(choice.name)

    def paint(
        self, order: Order, choice: Choice, seed: int, on_step: Callable[[int, int], None]
    ) -> Any:
        if order.description in self.errors:
            raise self.errors[order.description]
        for step in (1, 2):
            assert self.steps.acquire(timeout=PATIENCE)
            on_step(step, 2)
        self.drawn.append(f"{order.description} {seed}")
        return seed

    def close(self) -> None:
        self.loaded.clear()


@pytest.fixture
def painter() -> HandPainter:
    return HandPainter()


@pytest.fixture
def engine(painter: HandPainter) -> Iterator[Engine]:
    engine = Engine(painter)
    yield engine
    painter.steps.release(1000)
    engine.close()


def order(base: Choice, words: str = "a rocket", **values: Any) -> Order:
    return take_order(description=words, choices=[base], **{"seed": 1, **values})


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def drawing(engine: Engine, job: Job) -> Callable[[], bool]:
    return lambda: engine.look(job).state == "drawing"


def test_each_waiting_request_knows_how_many_come_before_it(
    engine: Engine, painter: HandPainter, base: Choice
) -> None:
    first = engine.submit(order(base), "ann")
    until(drawing(engine, first))
    second, third = engine.submit(order(base), "bea"), engine.submit(order(base), "cem")
    assert [engine.look(job).before for job in (first, second, third)] == [0, 1, 2]
    painter.steps.release(2)
    until(drawing(engine, second))
    assert engine.look(third).before == 1
    painter.steps.release(4)
    assert engine.wait(third, PATIENCE).state == "done"


def test_who_asks_for_one_poster_does_not_wait_for_anothers_three(
    engine: Engine, painter: HandPainter, base: Choice
) -> None:
    many = engine.submit(order(base, "many", count=3), "ann")
    until(drawing(engine, many))
    one = engine.submit(order(base, "one"), "bea")
    painter.steps.release(8)
    assert engine.wait(many, PATIENCE).state == "done"
    assert engine.wait(one, PATIENCE).state == "done"
    assert painter.drawn == ["many 1", "one 1", "many 2", "many 3"]


def test_posters_come_one_by_one_with_the_steps_between(
    engine: Engine, painter: HandPainter, base: Choice
) -> None:
    job = engine.submit(order(base, count=2), "ann")
    painter.steps.release(3)
    until(lambda: (v := engine.look(job)).step == 1 and len(v.posters) == 1)
    view = engine.look(job)
    assert (view.steps, view.total, view.finished) == (2, 2, False)
    assert view.share == pytest.approx(0.75)
    assert view.seconds_left is not None and view.seconds_left >= 0
    painter.steps.release()
    assert engine.wait(job, PATIENCE).posters == (1, 2)


def test_a_request_is_cancelled_between_two_steps_and_keeps_what_is_drawn(
    engine: Engine, painter: HandPainter, base: Choice
) -> None:
    job = engine.submit(order(base, count=3), "ann")
    painter.steps.release(2)
    until(lambda: len(engine.look(job).posters) == 1)
    engine.cancel(job)
    painter.steps.release(1)
    view = engine.wait(job, PATIENCE)
    assert (view.state, view.posters) == ("cancelled", (1,))
    assert painter.drawn == ["a rocket 1"]


def test_a_waiting_request_is_cancelled_at_once_and_the_next_moves_up(
    engine: Engine, painter: HandPainter, base: Choice
) -> None:
    first = engine.submit(order(base), "ann")
    until(drawing(engine, first))
    second, third = engine.submit(order(base), "bea"), engine.submit(order(base), "cem")
    engine.cancel(second)
    assert engine.look(second).state == "cancelled"
    assert engine.look(third).before == 1


def test_a_model_is_loaded_ahead_once_and_a_failure_of_that_stops_nothing(
    engine: Engine, painter: HandPainter, base: Choice
) -> None:
    loaded: list[str] = []

    def prepare(choice: Choice) -> None:
        loaded.append(choice.name)
        if choice.name == "broken":
            raise ModelMissing("the model is not there")

    painter.prepare = prepare  # type: ignore[method-assign]
    engine.warm(base)
    until(lambda: loaded == [base.name])
    engine.warm(base)
    engine.warm(Choice("broken", "tuned", base.folder))
    until(lambda: loaded == [base.name, "broken"])
    painter.steps.release(2)
    assert engine.wait(engine.submit(order(base), "ann"), PATIENCE).state == "done"


def test_the_memory_is_given_back_when_nobody_asks_for_a_while(
    engine: Engine, painter: HandPainter, base: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "IDLE_SECONDS", 0.1)
    for _ in range(2):  # who opens the page again has the model loaded again
        engine.warm(base)
        until(lambda: base.name in painter.loaded)
        until(lambda: not painter.loaded)
    job = engine.submit(order(base), "ann")
    until(drawing(engine, job))
    time.sleep(0.3)  # drawing is not idle, however long a step takes
    assert painter.loaded
    painter.steps.release(2)
    assert engine.wait(job, PATIENCE).state == "done"
    until(lambda: not painter.loaded)


def test_a_second_request_of_the_same_visit_waits_for_the_first(
    engine: Engine, painter: HandPainter, base: Choice
) -> None:
    first = engine.submit(order(base), "ann")
    with pytest.raises(QueueFull, match="wait for it or cancel it"):
        engine.submit(order(base), "ann")
    engine.cancel(first)
    painter.steps.release(3)  # one for the first, in case it was being drawn already
    assert engine.wait(engine.submit(order(base), "ann"), PATIENCE).state == "done"


def test_a_full_queue_refuses_with_a_sentence(
    engine: Engine, base: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "MOST_WAITING", 1)
    first = engine.submit(order(base), "ann")
    until(drawing(engine, first))
    engine.submit(order(base), "bea")
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        engine.submit(order(base), "cem")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("shapes do not match"), "The model failed (RuntimeError"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            "ask whoever runs the studio",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (ModelMissing("the model directory x is not there: restore it"), "The model directory x"),
    ],
)
def test_a_model_that_fails_tells_a_sentence_and_the_next_request_is_drawn(
    engine: Engine, painter: HandPainter, base: Choice, error: Exception, told: str
) -> None:
    painter.errors["bad"] = error
    failed = engine.wait(engine.submit(order(base, "bad", count=3), "ann"), PATIENCE)
    assert failed.state == "failed"
    (problem,) = failed.problems
    assert told in problem and problem.endswith(".")
    painter.steps.release(2)
    assert engine.wait(engine.submit(order(base), "ann"), PATIENCE).state == "done"


def test_a_request_whose_page_was_closed_is_dropped(painter: HandPainter, base: Choice) -> None:
    now = [0.0]
    engine = Engine(painter, clock=lambda: now[0])
    first = engine.submit(order(base), "ann", alive=lambda: False)
    until(drawing(engine, first))
    now[0] = engines.ABANDONED_AFTER - 1  # a phone that locked for a moment
    painter.steps.release(1)
    until(lambda: engine.look(first).step == 1)
    assert engine.look(first).state == "drawing"
    now[0] = engines.ABANDONED_AFTER + 1
    painter.steps.release(1)
    assert engine.wait(first, PATIENCE).state == "cancelled"
    engine.close()


def test_many_visits_at_once_all_get_their_posters(
    engine: Engine, painter: HandPainter, base: Choice
) -> None:
    painter.steps.release(1000)
    views: dict[str, Any] = {}

    def visit(name: str) -> None:
        views[name] = engine.wait(engine.submit(order(base, name, count=3), name), PATIENCE)

    threads = [threading.Thread(target=visit, args=(f"visit {i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert {view.state for view in views.values()} == {"done"}
    assert sorted(painter.drawn) == sorted(f"visit {i} {s}" for i in range(20) for s in (1, 2, 3))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"description": " \n\t "}, "Describe the poster first"),
        ({"description": "x" * 1001}, "1001 characters"),
        ({"negative": "x" * 1001}, "negative prompt"),
        ({"title": "x" * 81}, "title"),
        ({"title": "!?!"}, "no letters"),
        ({"count": 0}, "Between 1 and 12"),
        ({"count": 13}, "Between 1 and 12"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"choices": []}, "No model"),
    ],
)
def test_bad_input_gets_a_sentence(base: Choice, values: dict[str, Any], told: str) -> None:
    with pytest.raises(OrderRejected, match=told) as rejected:
        take_order(**{"description": "a rocket", "choices": [base], **values})
    assert str(rejected.value).endswith(".")


def test_seeds_count_up_and_go_round_at_the_end(base: Choice) -> None:
    assert order(base, count=3, seed=2**32 - 2).seeds == (2**32 - 2, 2**32 - 1, 0)
    assert order(base, seed=None, count=2).seeds != order(base, seed=None, count=2).seeds


def test_words_reach_the_model_as_typed_but_for_control_characters(base: Choice) -> None:
    words = "a <b>red</b> rocket\x00 $x^2$ :smile:\n `rm -rf /`"
    assert order(base, words).description == "a <b>red</b> rocket $x^2$ :smile: `rm -rf /`"
