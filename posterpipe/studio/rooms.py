"""What all visits share: the settings, the engine, and what pages read.

What belongs here: one instance of each for the whole server. What does not: what belongs to a
visit (Streamlit's session state).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import streamlit as st
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from posterpipe.settings import Settings, load_settings
from posterpipe.studio.caption_desk import CaptionDesk
from posterpipe.studio.engine import Engine
from posterpipe.studio.published import Published
from posterpipe.studio.served import Models
from posterpipe.studio.worker import RemotePainter


@dataclass(frozen=True)
class Rooms:
    """The parts of the studio that know no Streamlit."""

    settings: Settings
    engine: Engine
    models: Models
    captions: CaptionDesk
    published: Published

    @property
    def store(self) -> Path:
        """Where images lie."""
        return self.settings.path(self.settings.store)


@st.cache_resource(show_spinner=False)
def rooms() -> Rooms:
    """Made by the first visit, shared by all."""
    settings = load_settings()
    return Rooms(
        settings=settings,
        engine=Engine(RemotePainter(settings)),
        models=Models(settings),
        captions=CaptionDesk(settings),
        published=Published(settings.published_path),
    )


def visitor() -> str:
    """The name of this visit."""
    context = get_script_run_ctx()
    return context.session_id if context else "nobody"


def is_served() -> bool:
    """Whether a browser sees the page; not so in tests that run a page by itself."""
    # Streamlit's tests put something in the runtime's place that claims to be one.
    return runtime.exists() and type(runtime.get_instance()) is runtime.Runtime


def presence() -> Callable[[], bool]:
    """Tells, from any thread, whether this visit's page is still open."""
    name = visitor()

    def open_still() -> bool:
        return not is_served() or runtime.get_instance().is_active_session(name)

    return open_still
