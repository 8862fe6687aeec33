"""What is wrong with captions.

What belongs here: repetition within a caption, and how much captions differ. What does not: their
length, which counts where they are trained on (`training_set`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from posterpipe.core.quality.finding import Finding, share_of
from posterpipe.core.store import cells

_NAMED = 3
"""Posters named for one caption; the rest are counted."""

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.casefold())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Every run of `n` words, in order."""
    found = words(text)
    return list(zip(*(found[start:] for start in range(n)), strict=False))


def repeated_share(caption: str, n: int = 2) -> float:
    """Which share of a caption's n-grams repeats an earlier one, 0 to 1.

    Welleck et al. 2020 (arXiv:1908.04319) call it seq-rep-n. With pairs of words `a cat cat cat`
    has 1/3, and a caption that says one phrase over and over comes near 1.
    """
    grams = ngrams(caption, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(captions: Iterable[str], n: int) -> float:
    """Distinct n-grams among all n-grams of the captions, 0 to 1 (Li et al. 2016,
    arXiv:1510.03055). It falls as captions are added, so it compares sets of one size only."""
    grams = Counter(gram for caption in captions for gram in ngrams(caption, n))
    return share_of(len(grams), grams.total())


def repeated_captions(
    captions: pd.DataFrame,
    names: Mapping[str, str],
    *,
    max_repeated_share: float,
    max_shared: float,
) -> Finding:
    """Captions in `poster_captions` that repeat themselves, and those that several posters share.

    Passes when none repeats itself more than `max_repeated_share` (see `repeated_share`) and at
    most the share `max_shared` of the posters has the caption of another. `names`: see
    `source_names`.
    """
    made = captions[captions["status"] == "ok"]
    posters_of: dict[str, list[str]] = {}
    wording: dict[str, str] = {}
    for poster_id, caption in cells(made, "poster_id", "caption"):
        same = _same_words(str(caption))
        wording.setdefault(same, str(caption))
        posters_of.setdefault(same, []).append(names.get(str(poster_id), str(poster_id)))
    repeating = [
        (wording[same], _some(posters), f"{share:.0%} of its word pairs are repeats")
        for same, posters in posters_of.items()
        if (share := repeated_share(same)) > max_repeated_share
    ]
    shared = sorted(
        (same for same, posters in posters_of.items() if len(posters) > 1),
        key=lambda same: -len(posters_of[same]),
    )
    sharing = [
        (wording[same], _some(posters_of[same]), f"{len(posters_of[same])} posters have it")
        for same in shared
    ]
    sharers = sum(len(posters_of[same]) for same in shared)
    share = share_of(sharers, len(made))
    return Finding(
        passed=not repeating and share <= max_shared,
        summary=f"{len(repeating)} captions repeat themselves, and {sharers} of {len(made)} "
        f"posters have the caption of another ({share:.1%}; at most {max_shared:.1%} are expected)",
        remedy="write better ones beside the posters (`<poster>.txt`) or into data/captions.csv, "
        "or raise captioner.num_beams and set captioner.no_repeat_ngram_size. The limits are "
        "checks.max_repeated_share and checks.max_shared_captions",
        expected=f"0 repeat themselves, at most {max_shared:g} share one",
        actual=f"{len(repeating)} repeat themselves, {share:.3g} share one",
        offenders=pd.DataFrame([*repeating, *sharing], columns=["caption", "posters", "problem"]),
        numbers={"repeating": len(repeating), "sharing": sharers, "sharing_share": share},
    )


def caption_diversity(
    captions: pd.DataFrame, names: Mapping[str, str], min_distinct: float
) -> Finding:
    """Which share of the captions in `poster_captions` is distinct.

    A captioner that says the same of every poster has nothing to teach. `names`: see
    `source_names`.
    """
    made = captions[captions["status"] == "ok"]
    texts = [str(caption) for caption in made["caption"].tolist()]
    by_words: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        by_words.setdefault(_same_words(text), []).append(place)
    share = share_of(len(by_words), len(texts))
    files = [names.get(str(poster_id), str(poster_id)) for poster_id in made["poster_id"].tolist()]
    often = sorted((places for places in by_words.values() if len(places) > 1), key=len)[::-1]
    return Finding(
        passed=bool(texts) and share >= min_distinct,
        summary=f"{len(by_words)} distinct captions for {len(texts)} posters ({share:.1%}); at "
        f"least {min_distinct:.1%} are needed",
        remedy="look at the captions and the training images: a captioner that cannot see says the "
        "same of every picture. The limit is checks.min_distinct_captions",
        expected=f"at least {min_distinct:g}",
        actual=share,
        offenders=pd.DataFrame(
            [
                (texts[places[0]], len(places), _some([files[place] for place in places]))
                for places in often
            ],
            columns=["caption", "count", "posters"],
        ),
        numbers={
            "distinct_1": distinct_n(texts, 1),
            "distinct_2": distinct_n(texts, 2),
            "mean_words": sum(len(words(text)) for text in texts) / max(len(texts), 1),
        },
    )


def _same_words(caption: str) -> str:
    """What two captions have in common that differ in case and spaces only."""
    return " ".join(caption.casefold().split())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
