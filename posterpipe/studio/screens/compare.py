"""Compare: base and champion side by side, on one prompt and one seed.

What belongs here: the page. What does not: the fields that it shares with the page Make
(`studio.desk`), which models there are (`studio.served`), and drawing (`studio.engine`).
"""

from collections.abc import Sequence
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from posterpipe.core.prompts import MAX_SEED
from posterpipe.studio import desk, look
from posterpipe.studio.desk import CHAMPION
from posterpipe.studio.engine import MAX_DESCRIPTION, Order, take_order
from posterpipe.studio.painter import Poster
from posterpipe.studio.rooms import rooms
from posterpipe.studio.served import Choice, Served

request = desk.Request("compared")


def rivals(models: Served) -> list[Choice]:
    """What the base model can be compared with, the champion first."""
    return [choice for choice in models.choices if choice.kind != "base"]


def typed(models: Served) -> Order:
    """The order that the fields hold."""
    state: Any = st.session_state
    chosen = state.get("compare.model", CHAMPION)
    rival = models.champion if chosen == CHAMPION else models.named(chosen)
    return take_order(
        description=state["compare.description"],
        negative=state["compare.negative"],
        seed=None if state["compare.seed"] is None else int(state["compare.seed"]),
        choices=[models.base, rival] if rival != models.base else [models.base],
    )


def draw() -> None:
    """Sends the order."""
    request.ask(lambda: typed(rooms().models.served()))


def keep_seed(order: Order) -> None:
    """The same noise for the next words."""
    state: Any = st.session_state
    state["compare.description"] = order.description
    state["compare.negative"] = order.negative
    state["compare.seed"] = order.seeds[0]


def take_over() -> None:
    """What stands in the fields of the page Make comes along, but for what was typed here."""
    state: Any = st.session_state
    defaults = desk.make_defaults()
    for field in ("description", "negative", "seed"):
        made, here, taken = f"make.{field}", f"compare.{field}", f"compare-taken-{field}"
        if here not in state or state[here] == state[taken]:
            state[here] = state[taken] = state.get(made, defaults[made])


def who(choice: Choice) -> str:
    """A model in a word or two, so that both stand on one line on a phone."""
    if choice.kind == "base":
        return "Base model"
    return "Champion" if choice.champion else f"Checkpoint {choice.name[:8]}"


class Pair:
    """Two posters beside each other, and what their scores say."""

    def places(self, count: int) -> list[DeltaGenerator]:
        """See `desk.Layout`."""
        with st.container(key="pair-posters"):
            return list(st.columns(max(2, count)))[:count]

    def poster(self, poster: Poster, index: int, final: bool) -> None:
        """See `desk.Layout`."""
        with st.container(key=f"poster-{index}"):
            look.faint(who(poster.choice), f"who-{index}")
            st.image(poster.png, alt=look.alt_text(poster), width="stretch")
            look.faint(look.told(poster), f"told-{index}")
            for place, text in enumerate(poster.notes):
                look.note(text, f"about-{index}-{place}")
            desk.save_button(poster, f"compared-{index}", label="Save", primary=False)

    def nothing(self) -> None:
        """See `desk.Layout`."""
        look.empty(
            "Two posters appear here",
            "Left by the base model, right by the fine-tuned one, from the same noise: what "
            "differs is what the fine-tuning taught.",
            "pair",
        )

    def after(self, posters: Sequence[Poster]) -> None:
        """See `desk.Layout`."""
        scores = [poster.score for poster in posters]
        if len(scores) == 2 and scores[0] is not None and scores[1] is not None:
            look.faint(
                f"Fit to the words (CLIP cosine): {scores[1] - scores[0]:+.3f} against the base "
                "model. One pair decides nothing; the page Scores tells how many agree.",
                "difference",
            )
        st.button(
            "Same seed, other words",
            key="do-compare-keep",
            on_click=keep_seed,
            args=(posters[0].order,),
            icon=":material/repeat:",
        )


def main() -> None:
    """The page."""
    st.title("Compare", anchor=False)
    models = desk.served()
    if models is None:
        return
    take_over()
    others = rivals(models)
    if not others:
        look.note(
            "There is no fine-tuned checkpoint yet, so the base model draws alone. Materialize "
            "dreambooth_checkpoint, or wait for the schedule, and both appear here.",
            "no-rival",
        )
    left, right = st.columns([4, 7], gap="large")
    with left:
        st.text_area(
            "Describe the poster", key="compare.description", max_chars=MAX_DESCRIPTION, height=120
        )
        desk.show_trigger("compare.description")
        st.button(
            "Draw both" if others else "Draw",
            key="do-compare",
            type="primary",
            icon=":material/compare:",
            on_click=draw,
            disabled=request.active,
            width="stretch",
        )
        with st.expander("Negative prompt, seed, checkpoint", icon=":material/tune:"):
            st.text_area(
                "Negative prompt: what to leave out", key="compare.negative", height=80,
                max_chars=MAX_DESCRIPTION,
            )  # fmt: skip
            st.number_input("Seed", 0, MAX_SEED, step=1, key="compare.seed", placeholder="any")
            if others:
                names = [choice.name for choice in others if not choice.champion]
                if models.champion.kind != "base":
                    names.insert(0, CHAMPION)
                if st.session_state.get("compare.model") not in names:
                    st.session_state["compare.model"] = names[0]
                st.selectbox(
                    "Compared with the base model",
                    names,
                    key="compare.model",
                    format_func=lambda name: (
                        (models.champion if name == CHAMPION else models.named(name)).label
                    ),
                )
    with right:
        request.show(Pair())


main()
