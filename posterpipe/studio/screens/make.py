"""Make a poster: a description, a button, the poster, and a button that saves it.

What belongs here: the page. What does not: the fields that it shares with the page Compare
(`studio.desk`), which models there are (`studio.served`), and drawing (`studio.engine`).
"""

from collections.abc import Sequence
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from posterpipe.core.prompts import MAX_SEED, Prompt
from posterpipe.core.typography import STYLES
from posterpipe.studio import desk, look
from posterpipe.studio.desk import CHAMPION
from posterpipe.studio.engine import (
    MAX_DESCRIPTION,
    MAX_POSTERS,
    MAX_TITLE,
    Order,
    take_order,
)
from posterpipe.studio.painter import Poster
from posterpipe.studio.rooms import rooms
from posterpipe.studio.served import Served

EXAMPLES = 4

SINGLE_WIDTH = 380
"""Pixels of a poster alone: with its buttons it then fits on a screen."""

request = desk.Request("made")


def examples(prompts: list[Prompt]) -> list[Prompt]:
    """A few prompts from all over the suite."""
    every = max(1, len(prompts) // EXAMPLES)
    return prompts[every - 1 :: every][:EXAMPLES]


def use_example(prompt: Prompt) -> None:
    """Puts an example into the fields."""
    state: Any = st.session_state
    state["make.description"] = prompt.prompt
    state["make.negative"] = prompt.negative
    state["make.title"] = prompt.title


def keep_seed(poster: Poster, models: Served) -> None:
    """Puts what a poster was made from into the fields, so that it comes again, or with other
    words."""
    order = poster.order
    state: Any = st.session_state
    state["make.description"] = order.description
    state["make.negative"] = order.negative
    state["make.title"] = order.title
    state["make.style"] = order.style
    state["make.count"] = 1
    state["make.seed"] = poster.seed
    model = models.now(poster.choice)
    state["make.model"] = CHAMPION if model is None or model.champion else model.name
    state["gone"] = "" if model else poster.choice.name


def any_seed() -> None:
    """A new seed each time again."""
    st.session_state["make.seed"] = None


def typed(models: Served) -> Order:
    """The order that the fields hold."""
    state: Any = st.session_state
    chosen = state["make.model"]
    return take_order(
        description=state["make.description"],
        negative=state["make.negative"],
        title=state["make.title"],
        style=state["make.style"],
        count=int(state["make.count"] or 1),
        seed=None if state["make.seed"] is None else int(state["make.seed"]),
        choices=[models.named(None if chosen == CHAMPION else chosen)],
    )


def generate() -> None:
    """Sends the order; the champion is the one of now."""
    request.ask(lambda: typed(rooms().models.served()))


def show_fields(models: Served, prompts: list[Prompt]) -> None:
    """What is asked for: the description and the button; the rest is folded away."""
    st.text_area(
        "Describe the poster",
        key="make.description",
        placeholder="a minimalist film poster of a red rocket, only one rocket in the centre, "
        "cream background",
        max_chars=MAX_DESCRIPTION,
        height=120,
    )
    desk.show_trigger("make.description")
    if prompts:
        with st.container(horizontal=True, key="examples", gap="xsmall"):
            for index, prompt in enumerate(examples(prompts)):
                # Ids hold letters, digits, - and _ alone.
                name = prompt.prompt_id.replace("-", " ").replace("_", " ").capitalize()
                st.button(name, key=f"do-example-{index}", on_click=use_example, args=(prompt,))
    st.button(
        "Generate",
        key="do-generate",
        type="primary",
        icon=":material/auto_awesome:",
        on_click=generate,
        disabled=request.active,
        width="stretch",
    )
    if st.session_state["make.seed"] is not None:
        with st.container(horizontal=True, vertical_alignment="center"):
            look.faint(f"Seed {st.session_state['make.seed']} is kept: change the words.", "seed")
            st.button("Any seed", key="do-any-seed", on_click=any_seed, type="tertiary")
        gone = st.session_state.get("gone")
        if gone and st.session_state["make.model"] == CHAMPION:
            look.note(
                f"The checkpoint {gone[:8]}, which drew that poster, is not in the store any more: "
                "the champion draws another one.",
                "gone",
            )
    with st.expander("Title, lettering, seed, model", icon=":material/tune:"):
        st.text_input(
            "Title, set in type on the poster", key="make.title", max_chars=MAX_TITLE,
            placeholder="none",
        )  # fmt: skip
        st.selectbox(
            "Lettering",
            ["auto", *sorted(STYLES)],
            key="make.style",
            format_func=lambda name: (
                "Chosen for the title" if name == "auto" else name.capitalize()
            ),
        )
        st.text_area(
            "Negative prompt: what to leave out", key="make.negative", height=80,
            max_chars=MAX_DESCRIPTION,
        )  # fmt: skip
        left, right = st.columns(2)
        with left:
            st.number_input("Posters", 1, MAX_POSTERS, key="make.count")
        with right:
            st.number_input(
                "Seed", 0, MAX_SEED, step=1, key="make.seed", placeholder="any",
                help="The same seed, words and model give the same poster again.",
            )  # fmt: skip
        names = [CHAMPION, *(choice.name for choice in models.choices if not choice.champion)]
        if st.session_state["make.model"] not in names:
            st.session_state["make.model"] = CHAMPION
        st.selectbox(
            "Model",
            names,
            key="make.model",
            format_func=lambda name: (
                (models.champion if name == CHAMPION else models.named(name)).label
            ),
        )
        if models.named(st.session_state["make.model"]).rejected:
            look.note(
                "The gate rejected this checkpoint. It can be tried here, and is never served.",
                "rejected",
            )


class Result:
    """The posters of the latest request, two in a row, each with its buttons."""

    def __init__(self, models: Served) -> None:
        self._models = models

    def places(self, count: int) -> list[DeltaGenerator]:
        """See `desk.Layout`."""
        if count == 1:
            return [st.container(width=SINGLE_WIDTH)]
        columns = st.columns(2)
        return [columns[index % 2].container() for index in range(count)]

    def poster(self, poster: Poster, index: int, final: bool) -> None:
        """See `desk.Layout`."""
        with st.container(key=f"poster-{index}"):
            st.image(poster.png, alt=look.alt_text(poster), width="stretch")
            look.faint(look.told(poster), f"told-{index}")
            for place, text in enumerate(poster.notes):
                look.note(text, f"about-{index}-{place}")
            desk.save_button(poster, f"made-{index}")
            if final:
                st.button(
                    "Same seed, other words",
                    key=f"do-keep-{index}",
                    on_click=keep_seed,
                    args=(poster, self._models),
                    icon=":material/repeat:",
                    width="stretch",
                )

    def nothing(self) -> None:
        """See `desk.Layout`."""
        if self._models.champion.kind == "base":
            who = "The base model will draw it: no fine-tuned checkpoint has passed the gate yet."
        else:
            who = "The champion will draw it: the fine-tuned checkpoint that passed the gate last."
        look.empty("Your poster appears here", f"Describe it and press Generate. {who}", "poster")

    def after(self, posters: Sequence[Poster]) -> None:
        """See `desk.Layout`."""


def show_history(models: Served) -> None:
    """What was made in this visit."""
    posters = desk.history()
    if not posters:
        return
    st.header("This visit", anchor=False, divider="gray")
    with st.container(horizontal=True, key="history"):
        for index, poster in enumerate(posters):
            with st.container(width=150, key=f"poster-past-{index}", gap="xsmall"):
                st.image(poster.preview, alt=look.alt_text(poster), width="stretch")
                look.faint(look.told(poster), f"past-{index}")
                desk.save_button(poster, f"past-{index}", label="Save", primary=False)
                st.button(
                    "Again", key=f"do-again-{index}", on_click=keep_seed, args=(poster, models),
                    icon=":material/repeat:", width="stretch",
                )  # fmt: skip


def main() -> None:
    """The page."""
    st.title("Make a poster", anchor=False)
    models = desk.served()
    if models is None:
        return
    rooms().engine.warm(models.champion)
    for key, value in desk.make_defaults().items():
        st.session_state.setdefault(key, value)
    for index, text in enumerate(models.notes):
        look.note(text, f"models-{index}")
    left, right = st.columns([5, 6], gap="large")
    with left:
        show_fields(models, desk.suite(rooms().settings))
    with right:
        result = st.container()
    show_history(models)
    with result:
        request.show(Result(models))


main()
