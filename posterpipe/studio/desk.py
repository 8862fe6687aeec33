"""One request of a visit on its way: asking, waiting, and showing what comes.

What belongs here: what the pages that draw have in common. What does not: what each of them asks
for (`screens`), and the queue itself (`engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from posterpipe.core.models import ModelMissing
from posterpipe.core.progress import duration
from posterpipe.core.prompts import Prompt, PromptSuiteError, load_suite
from posterpipe.core.training.training_set import training_caption
from posterpipe.settings import CaptionerSettings, Settings
from posterpipe.studio import look
from posterpipe.studio.engine import Job, Order, OrderRejected, QueueFull, View, one_line
from posterpipe.studio.painter import Poster
from posterpipe.studio.rooms import presence, rooms, visitor
from posterpipe.studio.served import Served

CHAMPION = "champion"
"""The choice of whichever model is the champion when the poster is drawn."""

POLL_SECONDS = 0.3
"""How often a page shows how far its request is."""

MOST_KEPT = 48
"""Posters of a visit that are remembered."""


def served() -> Served | None:
    """The models as of now; where there is none, the page says so."""
    try:
        return rooms().models.served()
    except ModelMissing as error:
        look.note(f"Nothing can be drawn. {error}.", "no-model")
        return None


@st.cache_data(show_spinner=False, ttl=60)
def suite(settings: Settings) -> list[Prompt]:
    """The prompts of the suite, which serve as examples; none where it cannot be read."""
    try:
        return load_suite(settings.path(settings.prompt_suite))
    except PromptSuiteError:
        return []


def make_defaults() -> dict[str, Any]:
    """What the fields of the page Make hold before anything is typed, by their keys."""
    prompts = suite(rooms().settings)
    return {
        "make.description": "",
        "make.negative": prompts[0].negative if prompts else "",
        "make.title": "",
        "make.style": "auto",
        "make.count": 1,
        "make.seed": None,
        "make.model": CHAMPION,
    }


def show_trigger(field: str) -> None:
    """By which phrase the tuned look is called, where there is one, with a button that puts it
    into the description. `field`: the description's key."""
    captioner = rooms().settings.captioner
    trigger = one_line(captioner.trigger)
    if not trigger:
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        look.faint(f"The tuned look is called by: {trigger}", f"trigger-{field}")
        st.button(
            "Insert it",
            key=f"do-trigger-{field}",
            on_click=_insert_trigger,
            args=(field, captioner),
            type="tertiary",
            icon=":material/add:",
            disabled=_has_trigger(field, trigger),
        )


def _has_trigger(field: str, trigger: str) -> bool:
    # Where the phrase stands at the end, nobody types its comma.
    return trigger.casefold().strip(" ,;:.") in one_line(st.session_state[field]).casefold()


def _insert_trigger(field: str, captioner: CaptionerSettings) -> None:
    """Words the description as captions are worded for training."""
    trigger = one_line(captioner.trigger)
    if _has_trigger(field, trigger):  # typed just now, with the click that left the field
        return
    words = one_line(st.session_state[field])
    template = captioner.template
    st.session_state[field] = training_caption(words, template, trigger) if words else trigger


def history() -> list[Poster]:
    """The posters of this visit, the latest first."""
    posters: list[Poster] = st.session_state.setdefault("history", [])
    return posters


class Layout(Protocol):
    """How a page shows the posters of its request."""

    def places(self, count: int) -> Sequence[DeltaGenerator]:
        """A place on the page for each of so many posters."""
        ...

    def poster(self, poster: Poster, index: int, final: bool) -> None:
        """One poster in its place; `final` tells whether all are there."""
        ...

    def nothing(self) -> None:
        """What stands there before the first request."""
        ...

    def after(self, posters: Sequence[Poster]) -> None:
        """What stands below the posters when all are there."""
        ...


class Request:
    """The request of a page; `page` names it in the visit's state."""

    def __init__(self, page: str) -> None:
        self._page = page

    @property
    def job(self) -> Job | None:
        """What was asked for last."""
        job: Job | None = st.session_state.get(f"{self._page}-job")
        return job

    @property
    def active(self) -> bool:
        """Whether it is still on its way."""
        return self.job is not None and not rooms().engine.look(self.job).finished

    @property
    def trouble(self) -> str:
        """Why it was not taken, "" where it was."""
        return str(st.session_state.get(f"{self._page}-trouble", ""))

    def ask(self, order: Callable[[], Order]) -> None:
        """Send an order. What is wrong with it is shown where its posters would be."""
        trouble = ""
        try:
            job = rooms().engine.submit(order(), visitor(), presence())
        except (OrderRejected, QueueFull, ModelMissing) as error:
            trouble = str(error)
        else:
            st.session_state[f"{self._page}-job"] = job
            st.session_state[f"{self._page}-kept"] = 0
        st.session_state[f"{self._page}-trouble"] = trouble

    def show(self, layout: Layout) -> None:
        """The request as it comes along; returns when nothing more comes.

        To be called last on a page: while something is drawn, the page goes on running here, and
        whatever is clicked runs it anew. (A fragment that runs every second would do too, but one
        in many pages stood still under load, its last answer lost.)
        """
        if self.trouble:
            look.note(self.trouble, f"{self._page}-trouble")
        job = self.job
        if job is None:
            if not self.trouble:
                layout.nothing()
            return
        view = rooms().engine.look(job)
        if view.finished:
            self._remember(view)
            if view.state == "cancelled":
                drawn = f" after {_posters(len(view.posters))}" if view.posters else ""
                look.faint(f"Cancelled{drawn}.", f"{self._page}-cancelled")
            self._problems(view, 0)
            for index, place in enumerate(layout.places(len(view.posters))):
                with place:
                    layout.poster(view.posters[index], index, True)
            if view.posters:
                layout.after(view.posters)
            return
        self._follow(job, view, layout)
        st.rerun()  # buttons come back

    def _follow(self, job: Job, view: View, layout: Layout) -> None:
        bar = st.empty()
        st.button(
            "Cancel",
            key=f"do-cancel-{self._page}",
            on_click=rooms().engine.cancel,
            args=(job,),
            icon=":material/close:",
        )
        troubles = st.container()
        places = layout.places(view.total)
        shown = told = 0
        while True:
            bar.progress(view.share, text=said(view))
            with troubles:
                told = self._problems(view, told)
            for index in range(shown, len(view.posters)):
                with places[index]:
                    layout.poster(view.posters[index], index, False)
            shown = len(view.posters)
            self._remember(view)
            if view.finished:
                return
            view = rooms().engine.wait(job, POLL_SECONDS)

    def _problems(self, view: View, told: int) -> int:
        """Shows those after the first `told`; how many there are."""
        for index in range(told, len(view.problems)):
            look.note(view.problems[index], f"{self._page}-problem-{index}")
        return len(view.problems)

    def _remember(self, view: View) -> None:
        kept = int(st.session_state.get(f"{self._page}-kept", 0))
        for poster in view.posters[kept:]:
            history().insert(0, poster)
        del history()[MOST_KEPT:]
        st.session_state[f"{self._page}-kept"] = len(view.posters)


def said(view: View) -> str:
    """How far a request is, in words; nothing of it was typed."""
    done = len(view.posters) + len(view.problems)
    which = f"Poster {done + 1} of {view.total}" if view.total > 1 else "Your poster"
    if view.state == "waiting" and view.before:
        ahead = f"{view.before} before you"
        return f"{done} of {view.total} drawn, {ahead}" if done else f"Waiting: {ahead}"
    if view.state == "loading":
        return "Loading the model"
    if view.state == "drawing" and view.step:
        left = "" if view.seconds_left is None else f", {duration(view.seconds_left)} left"
        return f"{which}: step {view.step} of {view.steps}{left}"
    return f"{which} is next"


def _posters(count: int) -> str:
    return "1 poster" if count == 1 else f"{count} posters"


def save_button(
    poster: Poster, key: str, *, label: str = "Save Poster", primary: bool = True
) -> None:
    """A button that saves a poster with its settings inside."""
    st.download_button(
        label,
        poster.png,
        file_name=look.file_name(poster),
        mime="image/png",
        key=f"do-save-{key}",
        on_click="ignore",  # the page need not run again
        icon=":material/download:",
        type="primary" if primary else "secondary",
        width="stretch",
    )
