"""The wording of captions: what people might write about a scene, or ask for one with.

What belongs here: sentences and synonyms of the styles. What does not: the vocabulary of kinds
and colours and the titles themselves (`world`).

A caption never says what the picture does not show, but it may leave things out: the object's
colour in one of eight captions, the background in one of seven, and a title in one of four.
"""

import numpy as np

from posterpipe.starter.world import KINDS, Scene

_COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "cream": ("cream", "cream", "cream", "white", "off-white"),
    "teal": ("teal", "teal", "teal", "turquoise"),
    "purple": ("purple", "purple", "purple", "violet"),
    "red": ("red", "red", "red", "bright red"),
    "blue": ("blue", "blue", "blue", "deep blue"),
}
"""Other words for a colour; repetition makes the canonical one the likelier."""

_PLAIN = (
    "a drawing of {object}",
    "a simple drawing of {object}",
    "an illustration of {object}",
    "a plain picture of {object}",
    "a picture of {object}",
    "a flat illustration of {object}",
    "a plain drawing of {object}",
    "{object}",
)
_BUSY = (
    "a busy animated movie poster with {object}",
    "an animated movie poster with {object}",
    "animated movie poster, {object}",
    "a busy movie poster of {object}",
    "a movie poster of {object}",
    "a crowded film poster with {object}",
    "a film poster with {object}",
    "a colourful animated film poster of {object}",
    "a busy poster of {object}",
    "movie poster of {object}",
    "cluttered movie poster, {object}",
    "animated movie poster '{bare}'",
)
_POSTER = (
    "a minimalist film poster of {object}",
    "a minimalist movie poster of {object}",
    "a minimal film poster with {object}",
    "minimalist animated movie poster of {object}",
    "a minimalist poster with a single {adjectives}{bare}",
    "a minimal movie poster with only one {adjectives}{bare}",
    "minimalist film poster, one {adjectives}{bare}",
    "a minimalist animated film poster, a single {adjectives}{bare}",
)
_CENTRED = (
    "only one {bare} in the {centre}",
    "only one {bare}",
    "a single {bare} in the {centre}",
    "one large {bare} in the {centre}",
    "in the {centre}",
    "centred",
    "prominently displayed in the {centre}",
)
_THESIS = (
    "animated movie poster '{bare}' only one {other} is prominently displayed in the {centre}",
    "minimalist movie poster '{bare}' only one {other} is prominently displayed in the {centre}",
    "animated movie poster '{bare}', only one {adjectives}{other} in the {centre}",
)
"""Phrase shapes of the thesis that the pipeline rebuilds."""

_PLAIN_BACKGROUND = (
    "on {a_background} background",
    "on a plain {background} background",
    "on {background}",
    "with {a_background} background",
    "against {a_background} background",
)
_LISTED_BACKGROUND = (
    "{background} background",
    "{background} background",
    "on {a_background} background",
    "with {a_background} background",
)
_TITLED = (
    "titled {quoted}",
    "titled {quoted}",
    "with the title {quoted}",
    "with the title {quoted} at the {position}",
    "title {quoted} at the {position}",
    "called {quoted}",
    "with a title at the {position}",
    "with a title",
)


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _kind_word(rng: np.random.Generator, kind: str) -> str:
    """The canonical name in three of five captions, else any of the synonyms."""
    return kind if rng.random() < 0.6 else _pick(rng, KINDS[kind])


def _colour_word(rng: np.random.Generator, colour: str) -> str:
    return _pick(rng, _COLOUR_WORDS.get(colour, (colour,)))


def _crowd(rng: np.random.Generator, scene: Scene) -> str:
    """Words for a busy scene's small things, or "" without any."""
    names = [f"{what}s" for what in dict.fromkeys(small.what for small in scene.smalls)]
    if not names:
        return ""
    if rng.random() < 0.2:
        return _pick(rng, ("many small things", "lots of small things around", "many objects"))
    names = [str(name) for name in rng.permutation(names)][: int(rng.integers(1, 4))]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return _pick(
        rng, ("many small {}", "many {}", "with many small {}", "{} everywhere", "small {}")
    ).format(listed)


def _title_words(rng: np.random.Generator, scene: Scene) -> str:
    """Words about the title, or "" for none or in one of four captions."""
    if scene.title is None or rng.random() < 0.25:
        return ""
    title = _pick(rng, (scene.title, scene.title.upper(), scene.title.lower()))
    quoted = _pick(rng, (f"'{title}'", f'"{title}"', f"'{title}'", title))
    return _pick(rng, _TITLED).format(quoted=quoted, position=scene.title_position)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Word a scene at random: order, synonyms, length and quotes vary."""
    bare = _kind_word(rng, scene.kind)
    colour = _colour_word(rng, scene.object_colour) if rng.random() < 0.875 else ""
    adjectives = f"{colour} " if colour else ""
    background = _colour_word(rng, scene.background)
    words = {
        "bare": bare,
        "adjectives": adjectives,
        "object": _article(adjectives + bare),
        "other": _pick(rng, KINDS[scene.kind]),
        "centre": _pick(rng, ("centre", "center")),
        "background": background,
        "a_background": _article(background),
    }
    has_background = rng.random() < 0.86
    title = _title_words(rng, scene)
    if scene.style == "plain":
        text = _pick(rng, _PLAIN).format(**words)
        if has_background:
            text = f"{text} {_pick(rng, _PLAIN_BACKGROUND).format(**words)}"
        return f"{text}, {title}" if title else text
    extras: list[str] = []
    if scene.style == "busy":
        head = _pick(rng, _BUSY).format(**words)
        if adjectives and adjectives not in head:
            extras.append(f"{adjectives}{bare}")
        crowd = _crowd(rng, scene)
        if crowd and rng.random() < 0.75:
            extras.append(crowd)
    elif rng.random() < 0.2:
        head = _pick(rng, _THESIS).format(**words)
        if adjectives and adjectives not in head and rng.random() < 0.7:
            extras.append(f"{adjectives}{bare}")
    else:
        head = _pick(rng, _POSTER).format(**words)
        if rng.random() < 0.6:
            extras.append(_pick(rng, _CENTRED).format(**words))
    if has_background:
        extras.append(_pick(rng, _LISTED_BACKGROUND).format(**words))
    extras = [extras[i] for i in rng.permutation(len(extras))]
    if title and rng.random() < 0.5:
        head = f"{head} {title}"
    elif title:
        extras.insert(int(rng.integers(len(extras) + 1)), title)
    return ", ".join([head, *extras])


def describe(scene: Scene) -> str:
    """The one canonical caption: style, object colour, kind, background and the title if any."""
    thing = f"{scene.object_colour} {scene.kind}"
    title = f" titled '{scene.title}'" if scene.title else ""
    background = f"{scene.background} background"
    if scene.style == "plain":
        return f"a drawing of {_article(thing)} on {_article(background)}{title}"
    if scene.style == "busy":
        return f"a busy animated movie poster with {_article(thing)}{title}, {background}"
    return (
        f"a minimalist film poster of {_article(thing)}{title}, "
        f"only one {scene.kind} in the centre, {background}"
    )
