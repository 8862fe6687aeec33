"""The studio's frame: its pages and how one comes to them.

What belongs here: the list of pages. What does not: the pages (`screens`). Streamlit runs this file
anew at every click; `posterpipe studio` serves it.
"""

from pathlib import Path

import streamlit as st

from posterpipe.studio.look import dress, icon

SCREENS = Path(__file__).with_name("screens")

st.set_page_config(page_title="posterpipe studio", page_icon=icon(), layout="wide")
dress()
# What was typed stays when another page is looked at; Streamlit forgets what it does not show.
for name in list(st.session_state):
    if str(name).startswith(("make.", "compare.", "captions.", "scores.")):
        st.session_state[name] = st.session_state[name]

st.navigation(
    [
        st.Page(SCREENS / "make.py", title="Make a poster", icon=":material/brush:", default=True),
        st.Page(SCREENS / "compare.py", title="Compare", icon=":material/compare:"),
        st.Page(SCREENS / "captions.py", title="Captions", icon=":material/edit_note:"),
        st.Page(SCREENS / "scores.py", title="Scores", icon=":material/leaderboard:"),
    ],
    position="top",
).run()
