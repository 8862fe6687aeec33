"""Captions: posters with their captions, to look through and to mend.

What belongs here: the page. What does not: finding captions and keeping mended ones
(`studio.caption_desk`).
"""

import hashlib
from typing import Any

import streamlit as st

from posterpipe.core.captions.csv_file import CaptionsFileError
from posterpipe.core.captions.edits import CaptionConflict
from posterpipe.core.captions.people import MAX_CHARACTERS, CaptionRejected, clean_caption
from posterpipe.core.posters.listing import PlaceMissing
from posterpipe.studio import look
from posterpipe.studio.caption_desk import Captioned
from posterpipe.studio.rooms import rooms

SHOWN = 12
"""Posters on a page."""

ALL, FLAGGED, MACHINE, HUMAN = "All", "To look at", "By the machine", "By people"


@st.cache_data(show_spinner=False, max_entries=2_000)
def picture(name: str, stamp: tuple[int, int, str]) -> bytes | None:
    """A small picture of a poster; `stamp` changes with its file."""
    return rooms().captions.picture(name)


def matching(rows: list[Captioned], shown: str, words: str) -> list[Captioned]:
    """The posters that a filter and some words leave."""
    kept = {
        FLAGGED: lambda row: bool(row.flags),
        MACHINE: lambda row: row.source == "machine",
        HUMAN: lambda row: row.source == "human",
    }.get(shown, lambda row: True)
    wanted = words.casefold().split()
    return [
        row
        for row in rows
        if kept(row) and all(word in f"{row.name} {row.caption}".casefold() for word in wanted)
    ]


class Editor:
    """The text field of one poster, and what its writer has seen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.id = hashlib.sha256(name.encode()).hexdigest()[:12]
        self.key = f"captions.text-{self.id}"
        self._seen = f"seen-{self.id}"
        self._theirs = f"theirs-{self.id}"
        self._said = f"said-{self.id}"

    def open(self, row: Captioned) -> None:
        """Brings the field up to date, unless something was typed into it."""
        state: Any = st.session_state
        if self.key not in state or self._seen not in state:
            state[self.key], state[self._seen] = row.caption, (row.written, row.caption)
        written, caption = state[self._seen]
        if row.written == written and row.caption == caption:
            return
        if state[self.key] in (caption, row.caption):
            state[self.key], state[self._seen] = row.caption, (row.written, row.caption)
            state.pop(self._theirs, None)
        elif row.written != written:
            state[self._theirs] = row.written  # typed here, and changed elsewhere meanwhile

    @property
    def theirs(self) -> tuple[str | None] | None:
        """What someone else wrote meanwhile, in a tuple; None where nobody did."""
        state: Any = st.session_state
        return (state[self._theirs],) if self._theirs in state else None

    @property
    def said(self) -> str:
        """What came of the last saving."""
        return str(st.session_state.get(self._said, ""))

    def save(self) -> None:
        """Saves the field; a conflict is kept, to be shown."""
        state: Any = st.session_state
        written, _ = state[self._seen]
        text = state[self.key]
        state[self._said] = ""
        try:
            path = rooms().captions.save(self.name, text, seen=written)
        except CaptionConflict as conflict:
            state[self._theirs] = conflict.current
        except (CaptionRejected, CaptionsFileError, PlaceMissing) as error:
            sentence = str(error)
            state[self._said] = f"Not saved: {sentence}."
        else:
            clean = clean_caption(text)
            state[self.key], state[self._seen] = clean, (clean, clean)
            state.pop(self._theirs, None)
            state[self._said] = (
                f"Saved in {path.name}. What follows from it is rebuilt when the pipeline runs."
            )

    def take_back(self) -> None:
        """Removes the caption by a person, unless it is not any more the one that was seen."""
        state: Any = st.session_state
        written, _ = state[self._seen]
        state[self._said] = ""
        try:
            left = rooms().captions.take_back(self.name, seen=written)
        except CaptionConflict:
            state[self._said] = (
                "Not taken back: someone else changed it meanwhile. Look at it, and press again."
            )
        except (CaptionRejected, CaptionsFileError, PlaceMissing) as error:
            sentence = str(error)
            state[self._said] = f"Not taken back: {sentence}."
        else:
            del state[self.key], state[self._seen]  # the field opens anew
            state[self._said] = (
                "Taken back. The captioner's words count from the pipeline's next run on."
                if left is None
                else "Taken back. Another text by a person is there too, which counts now."
            )

    def save_over(self) -> None:
        """Saves the field although someone else wrote meanwhile, having seen what."""
        state: Any = st.session_state
        state[self._seen] = (state[self._theirs], state[self._seen][1])
        self.save()

    def take_theirs(self) -> None:
        """Gives up what was typed."""
        state: Any = st.session_state
        theirs = state.pop(self._theirs)
        state[self.key], state[self._seen] = theirs or "", (theirs, theirs or "")
        state[self._said] = ""


@st.fragment
def show(row: Captioned) -> None:
    """One poster with its caption; edits of it run nothing else of the page again."""
    # In a fragment that runs again the row may be an old one.
    row = next((now for now in rooms().captions.rows() if now.name == row.name), row)
    editor = Editor(row.name)
    editor.open(row)
    small, wide = st.columns([1, 4])
    with small, st.container(key=f"poster-caption-{editor.id}"):
        data = picture(row.name, rooms().captions.stamp(row.name))
        if data is None:
            look.faint("This picture cannot be shown.", f"no-picture-{editor.id}")
        else:
            st.image(data, alt=f"The poster {row.name}", width="stretch")
    with wide:
        st.text(row.name)
        st.text_area("Caption", key=editor.key, max_chars=MAX_CHARACTERS, height=90)
        if row.source != "none":
            by = "by a person" if row.source == "human" else "by the captioner"
            pending = "" if row.trained_on else ", not yet taken up by the pipeline"
            look.faint(f"{by}{pending}", f"by-{editor.id}")
        for index, flag in enumerate(row.flags):
            look.note(flag, f"flag-{editor.id}-{index}")
        if editor.theirs is not None:
            conflict(editor, editor.theirs[0])
        else:
            show_buttons(editor, row)
        if editor.said:
            look.faint(editor.said, f"said-{editor.id}")


def show_buttons(editor: Editor, row: Captioned) -> None:
    """What can be done with a caption that nobody else is changing."""
    untouched = st.session_state[editor.key] == row.caption
    confirms = row.source == "machine" and untouched
    with st.container(horizontal=True):
        # The same button by another name: one that is closed while nothing is typed would lose the
        # click that ends the typing.
        st.button(
            "Confirm" if confirms else "Save",
            key=f"do-save-{editor.id}",
            on_click=editor.save,
        )
        if row.written is not None:
            st.button(
                "Use the captioner's again",
                key=f"do-back-{editor.id}",
                on_click=editor.take_back,
                type="tertiary",
                icon=":material/undo:",
            )


def conflict(editor: Editor, theirs: str | None) -> None:
    """Both texts, and the choice between them."""
    look.note(
        "Someone else changed this caption while you were writing. Nothing was overwritten.",
        f"conflict-{editor.id}",
    )
    st.caption("Theirs")
    st.text(theirs if theirs is not None else "They removed the caption.")
    st.caption("Yours")
    st.text(st.session_state[editor.key])
    with st.container(horizontal=True):
        st.button("Keep theirs", key=f"do-theirs-{editor.id}", on_click=editor.take_theirs)
        st.button("Save mine instead", key=f"do-mine-{editor.id}", on_click=editor.save_over)


def turn(step: int) -> None:
    """To the next page of posters, or the one before."""
    st.session_state["page"] = max(0, st.session_state.get("page", 0) + step)


def first_page() -> None:
    """Another filter begins at its beginning."""
    st.session_state["page"] = 0


def main() -> None:
    """The page."""
    st.title("Captions", anchor=False)
    st.text(
        "Each poster is learnt under its caption. What you write wins over the captioner; Confirm "
        "makes its words yours, so that it is not asked about that poster again."
    )
    try:
        rows = rooms().captions.rows()
    except (PlaceMissing, CaptionsFileError) as error:
        sentence = str(error)
        look.note(f"{sentence}.", "no-captions")
        return
    if not rows:
        look.empty("No posters yet", f"Put posters into {rooms().captions.location}.", "no-posters")
        return
    st.session_state.setdefault("captions.filter", ALL)
    st.session_state.setdefault("captions.words", "")
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    with left:
        st.radio(
            "Show", [ALL, FLAGGED, MACHINE, HUMAN], key="captions.filter", horizontal=True,
            on_change=first_page,
        )  # fmt: skip
    with right:
        st.text_input(
            "Search names and captions", key="captions.words", on_change=first_page, max_chars=200
        )
    found = matching(
        rows, st.session_state["captions.filter"] or ALL, st.session_state["captions.words"]
    )
    pages = max(1, -(-len(found) // SHOWN))
    page = min(st.session_state.get("page", 0), pages - 1)
    st.session_state["page"] = page
    people = sum(row.source == "human" for row in rows)
    look.faint(
        f"{len(found)} of {len(rows)} posters; {people} captions by people, "
        f"{sum(bool(row.flags) for row in rows)} to look at",
        "count",
    )
    if not found:
        look.empty("None", "No poster matches. Try another filter or fewer words.", "no-match")
    for row in found[page * SHOWN : (page + 1) * SHOWN]:
        show(row)
        st.divider()
    if pages > 1:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.button("Before", key="do-before", on_click=turn, args=(-1,), disabled=page == 0)
            look.faint(f"Page {page + 1} of {pages}", "page")
            st.button("Next", key="do-next", on_click=turn, args=(1,), disabled=page == pages - 1)


main()
