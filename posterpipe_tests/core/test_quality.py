"""The numbers behind the checks: a planted fault is found and named, good data has none."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from posterpipe.core import quality
from posterpipe.core.images import hash_distance, perceptual_hash, png_bytes
from posterpipe.core.posters.arrivals import holdout_entries
from posterpipe.core.posters.landing import scan_holdout
from posterpipe.core.posters.listing import HOLDOUT, Folder
from posterpipe.core.quality import Finding
from posterpipe.core.quality.training_set import _nearest
from posterpipe.core.store import Store
from posterpipe.settings import ImageSettings, default_root

HASHES = st.integers(0, 2**64 - 1).map(lambda value: f"{value:016x}")
UNTIMED = settings(deadline=None, max_examples=60)
"""A busy machine may take any time."""
NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)


def raw_posters(
    *names: str, status: str = "ok", near: str = "", hashes: list[str] | None = None
) -> pd.DataFrame:
    """`raw_posters` of some files, each of bytes and looks of its own."""
    looks = hashes or [f"{0x1111111111111111 * (place + 1):016x}" for place in range(len(names))]
    return pd.DataFrame(
        {
            "poster_id": [f"id of {name}" for name in names],
            "source_name": list(names),
            "perceptual_hash": looks if status == "ok" else "",
            "status": status,
            "reason": "" if status == "ok" else f"{status} for a test",
            "near_duplicate_of": near,
        }
    )


def captions(*texts: str) -> pd.DataFrame:
    ids = [f"id of {place}.png" for place in range(len(texts))]
    return pd.DataFrame({"poster_id": ids, "caption": texts, "status": "ok"})


def names_of(finding: Finding) -> set[str]:
    """Everything that the table of offenders says in its first column."""
    return set(finding.offenders.iloc[:, 0].astype(str))


# -- posters ---------------------------------------------------------------------------------------


def test_too_few_usable_posters_fail_with_the_refused_ones_and_what_to_do() -> None:
    posters = pd.concat([raw_posters("a.png", "b.png"), raw_posters("c.png", status="rejected")])
    assert quality.enough_posters(posters, 2).passed
    finding = quality.enough_posters(posters, 3)
    assert not finding.passed
    assert finding.actual == 2
    assert names_of(finding) == {"c.png"}
    assert "2 usable posters; at least 3 are needed" in finding.description
    assert "checks.min_posters" in finding.description


def test_the_share_of_rejected_files_leaves_duplicates_alone() -> None:
    good = [raw_posters(*"abcdef"), raw_posters("g", status="duplicate")]
    posters = pd.concat([*good, raw_posters("bad.jpg", status="rejected")])
    assert quality.rejected_share(posters, 1 / 8).passed
    finding = quality.rejected_share(posters, 0.12)
    assert not finding.passed
    assert finding.actual == 1 / 8
    assert names_of(finding) == {"bad.jpg"}


def test_near_duplicates_are_counted_and_named_with_what_they_resemble() -> None:
    posters = pd.concat([raw_posters(*"abc"), raw_posters("copy.jpg", near="a")])
    finding = quality.near_duplicates(posters, 0.1)
    assert not finding.passed
    assert finding.actual == 1 / 4
    assert finding.offenders.to_dict("records") == [
        {"source_name": "copy.jpg", "near_duplicate_of": "a"}
    ]
    allowed = quality.near_duplicates(posters, 0.25)
    assert allowed.passed
    assert names_of(allowed) == {"copy.jpg"}


def test_no_posters_at_all_are_no_share_of_anything() -> None:
    nothing = raw_posters()
    assert quality.rejected_share(nothing, 0).passed
    assert quality.near_duplicates(nothing, 0).passed
    assert not quality.enough_posters(nothing, 1).passed


def test_a_duplicate_goes_by_the_name_of_the_file_that_is_used() -> None:
    posters = pd.concat([raw_posters("a", status="duplicate"), raw_posters("z")])
    posters["poster_id"] = "the same"
    assert quality.source_names(posters) == {"the same": "z"}


# -- images ----------------------------------------------------------------------------------------


def plain(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (60, 90), (red, green, blue))


def poster(ground: tuple[int, int, int], figure: tuple[int, int, int]) -> Image.Image:
    image = plain(*ground)
    ImageDraw.Draw(image).ellipse((20, 30, 40, 60), fill=figure)
    return image


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (plain(0, 0, 0), "all black"),
        (plain(6, 7, 5), "all black"),
        (jpeg(plain(3, 3, 3)), "all black"),
        (plain(255, 255, 255), "all white"),
        (jpeg(plain(252, 255, 250)), "all white"),
        (plain(200, 30, 90), "all of one colour"),
        (jpeg(plain(120, 60, 200)), "all of one colour"),
        (plain(9, 9, 9), "all of one colour"),
        (poster((0, 0, 0), (255, 255, 255)), ""),
        (poster((255, 255, 255), (230, 230, 230)), ""),
        (poster((0, 0, 0), (0, 0, 40)), ""),
        # The same brightness, two colours.
        (poster((200, 40, 40), (40, 121, 40)), ""),
    ],
)
def test_images_that_show_nothing_are_told_from_sparse_ones(
    image: Image.Image, reason: str
) -> None:
    assert quality.blank_reason(quality.image_statistics(image)) == reason


def test_dust_does_not_make_a_picture() -> None:
    image = plain(0, 0, 0)
    image.putpixel((5, 5), (255, 255, 255))
    assert quality.blank_reason(quality.image_statistics(image)) == "all black"


@UNTIMED
@given(seed=st.integers(0, 2**32 - 1), low=st.integers(0, 255), span=st.integers(0, 255))
def test_the_statistics_of_an_image_are_those_of_its_pixels(seed: int, low: int, span: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(low, min(low + span, 255) + 1, (9, 7, 3)).astype(np.uint8)
    found = quality.image_statistics(Image.fromarray(pixels))
    # So few pixels that the tails hold none.
    assert found["darkest"] == pixels.min()
    assert found["brightest"] == pixels.max()
    expected = pixels.reshape(-1, 3).astype(float).std(axis=0).max()
    assert math.isclose(found["deviation"], expected, abs_tol=1e-6)


def test_an_image_is_measured_once_and_a_lost_one_again(store: Store) -> None:
    shown = store.put(png_bytes(poster((0, 0, 0), (9, 200, 9))), ".png")
    lost = store.put(png_bytes(plain(1, 2, 3)), ".png")
    data = store.path(lost, ".png").read_bytes()
    store.path(lost, ".png").unlink()
    first = quality.stored_statistics(store, [shown, lost])
    assert quality.blank_reason(first[shown]) == ""
    assert "gone" in quality.blank_reason(first[lost])
    store.path(shown, ".png").unlink()
    store.put(data, ".png")
    second = quality.stored_statistics(store, [shown, lost])
    assert second[shown] == first[shown]
    assert quality.blank_reason(second[lost]) == "all black"


def test_a_damaged_image_is_named_and_does_not_stop_the_others(store: Store) -> None:
    data = png_bytes(poster((9, 9, 200), (200, 9, 9)))
    damaged = store.put(data[: len(data) // 2], ".png")
    good = store.put(data, ".png")
    found = quality.stored_statistics(store, [damaged, good])
    assert quality.blank_reason(found[damaged]).startswith("cannot be read")
    assert quality.blank_reason(found[good]) == ""


def resized(*images: str) -> pd.DataFrame:
    ids = [f"id of {place}.png" for place in range(len(images))]
    return pd.DataFrame({"poster_id": ids, "image": images, "status": "ok"})


def test_blank_training_images_are_named_by_their_files() -> None:
    show = {"darkest": 0.0, "brightest": 255.0, "deviation": 50.0}
    black = {"darkest": 0.0, "brightest": 0.0, "deviation": 0.0}
    table = resized(*"abcd")
    table.loc[len(table)] = ["id of 9.png", "", "failed"]
    names = {f"id of {place}.png": f"{place}.png" for place in range(4)}
    statistics = {"a": show, "b": black, "c": show, "d": show}
    assert quality.blank_training_images(table, names, dict.fromkeys("abcd", show), 0).passed
    finding = quality.blank_training_images(table, names, statistics, 0.2)
    assert not finding.passed
    assert finding.actual == 1 / 4
    assert finding.offenders.to_dict("records") == [{"source_name": "1.png", "reason": "all black"}]
    assert quality.blank_training_images(table, names, statistics, 0.25).passed


def generations(statuses: dict[str, str], variant: str = "sd") -> pd.DataFrame:
    """One image a prompt, seed 7."""
    return pd.DataFrame(
        [
            {
                "generation_key": f"{variant} {prompt}",
                "variant": variant,
                "prompt_id": prompt,
                "seed": 7,
                "image": "" if status == "failed" else f"image of {prompt}",
                "status": status,
                "reason": "" if status == "ok" else f"{status} for a test",
            }
            for prompt, status in statuses.items()
        ]
    )


def test_blank_generations_are_those_that_were_blocked_and_those_that_should_have_been() -> None:
    show = {"darkest": 0.0, "brightest": 255.0, "deviation": 50.0}
    table = generations({"cat": "ok", "red": "blocked", "sea": "ok", "car": "failed"})
    statistics = {"image of cat": show, "image of sea": {**show, "darkest": 250.0}}
    finding = quality.blank_generations(table, statistics, 0.5)
    assert not finding.passed
    assert finding.actual == 2 / 3
    assert dict(zip(finding.offenders["prompt_id"], finding.offenders["reason"], strict=True)) == {
        "red": "blocked for a test",
        "sea": "all white",
    }
    good = generations({"cat": "ok"})
    assert quality.blank_generations(good, statistics, 0).passed


# -- captions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "share"),
    [
        ("", 0),
        ("cat", 0),
        ("a poster of a red cat on a hill", 0),
        ("a cat cat cat", 1 / 3),
        ("A cat, a cat. a CAT", 3 / 5),
        ("a man with a man with a", 3 / 6),
        ("it's it's it's", 1 / 2),
    ],
)
def test_repeated_word_pairs_are_counted(caption: str, share: float) -> None:
    assert math.isclose(quality.repeated_share(caption), share)


@UNTIMED
@given(st.text(), st.integers(1, 4))
def test_shares_of_any_text_lie_within_0_and_1(text: str, n: int) -> None:
    assert 0 <= quality.repeated_share(text, n) < 1
    assert 0 <= quality.distinct_n([text, text], n) <= 1
    assert len(quality.ngrams(text, n)) == max(0, len(quality.words(text)) - n + 1)


@UNTIMED
@given(st.lists(st.sampled_from("abcdef"), min_size=1), st.integers(1, 6))
def test_saying_a_thing_again_only_adds_repeats(said: list[str], times: int) -> None:
    text = " ".join(said)
    again = " ".join([text] * (times + 1))
    assert quality.repeated_share(again) >= quality.repeated_share(text) - 1e-12


def test_distinct_n_is_the_share_of_different_ngrams() -> None:
    assert quality.distinct_n(["a red cat", "a red dog"], 1) == 4 / 6
    assert quality.distinct_n(["a red cat", "a red dog"], 2) == 3 / 4
    assert quality.distinct_n([], 2) == 0


def repeated(table: pd.DataFrame, *, max_shared: float = 0.1) -> Finding:
    names = {str(poster_id): str(poster_id)[6:] for poster_id in table["poster_id"]}
    return quality.repeated_captions(table, names, max_repeated_share=0.25, max_shared=max_shared)


def test_captions_that_repeat_themselves_or_each_other_are_named_with_their_posters() -> None:
    table = captions("a cat cat cat", "a blue sea", "A  blue sea", "a red car")
    finding = repeated(table)
    assert not finding.passed
    rows = finding.offenders.set_index("caption")
    assert list(rows.index) == ["a cat cat cat", "a blue sea"]
    assert rows.loc["a cat cat cat", "posters"] == "0.png"
    assert "33%" in str(rows.loc["a cat cat cat", "problem"])
    assert rows.loc["a blue sea", "posters"] == "1.png, 2.png"
    assert finding.numbers == {"repeating": 1, "sharing": 2, "sharing_share": 0.5}
    assert repeated(captions("a blue sea", "a red car")).passed


def test_some_shared_captions_are_allowed_but_shown() -> None:
    finding = repeated(captions("sea", "sea", "car", "cat"), max_shared=0.5)
    assert finding.passed
    assert names_of(finding) == {"sea"}


def test_failed_captions_count_for_nothing() -> None:
    table = captions("sea", "", "")
    table.loc[1:, "status"] = "failed"
    assert repeated(table).passed
    assert quality.caption_diversity(table, {}, 1).passed


def test_a_captioner_that_sees_nothing_is_noticed() -> None:
    same = captions(*["a movie poster"] * 9, "a cat")
    finding = quality.caption_diversity(same, {}, 0.25)
    assert not finding.passed
    assert finding.actual == 2 / 10
    assert finding.offenders["caption"].tolist() == ["a movie poster"]
    assert finding.offenders["count"].tolist() == [9]
    assert "and 6 more" in finding.offenders["posters"][0]
    different = captions("a cat", "a dog", "a movie poster")
    passed = quality.caption_diversity(different, {}, 1)
    assert passed.passed
    assert passed.numbers["distinct_1"] == 5 / 7
    assert not quality.caption_diversity(captions(), {}, 0).passed


# -- the training set ------------------------------------------------------------------------------


def training_set(folder: Path, *texts: str) -> pd.DataFrame:
    """A training set on disk and its table, one poster a caption."""
    lines = ["file_name,caption", *(f"train/{n}.png,{text}" for n, text in enumerate(texts))]
    data = "\n".join(lines).encode()
    version = hashlib.sha256(data).hexdigest()
    (folder / version / "train").mkdir(parents=True)
    (folder / version / "training.csv").write_bytes(data)
    for number in range(len(texts)):
        (folder / version / "train" / f"{number}.png").write_bytes(b"picture")
    return pd.DataFrame(
        {
            "file_name": [f"train/{number}.png" for number in range(len(texts))],
            "caption": list(texts),
            "poster_id": [f"id of {number}.png" for number in range(len(texts))],
            "image": hashlib.sha256(b"picture").hexdigest(),
            "training_set": version,
        }
    )


def test_posters_that_were_lost_before_the_training_set_are_named(tmp_path: Path) -> None:
    table = training_set(tmp_path, "a cat", "a dog")
    posters = raw_posters("0.png", "1.png", "2.png")
    assert quality.enough_rows(table, posters, 2).passed
    finding = quality.enough_rows(table, posters, 3)
    assert not finding.passed
    assert finding.actual == 2
    assert names_of(finding) == {"2.png"}


def without_image(table: pd.DataFrame, folder: Path) -> None:
    (folder / "train/1.png").unlink()


def with_empty_image(table: pd.DataFrame, folder: Path) -> None:
    (folder / "train/1.png").write_bytes(b"")


def with_another_image(table: pd.DataFrame, folder: Path) -> None:
    (folder / "train/1.png").unlink()
    (folder / "train/1.png").write_bytes(b"another picture")


def without_caption(table: pd.DataFrame, folder: Path) -> None:
    table.loc[1, "caption"] = " "


def with_missing_caption(table: pd.DataFrame, folder: Path) -> None:
    table["caption"] = table["caption"].astype(object)
    table.loc[1, "caption"] = None


def with_another_csv(table: pd.DataFrame, folder: Path) -> None:
    (folder / "training.csv").write_text("file_name,caption\n")


def without_csv(table: pd.DataFrame, folder: Path) -> None:
    (folder / "training.csv").unlink()


@pytest.mark.parametrize(
    ("fault", "named", "problem"),
    [
        (without_image, "train/1.png", "no image"),
        (with_empty_image, "train/1.png", "an empty file"),
        (with_another_image, "train/1.png", "another image than was written"),
        (without_caption, "train/1.png", "no caption"),
        (with_missing_caption, "train/1.png", "no caption"),
        (with_another_csv, "training.csv", "was changed after it was written"),
        (without_csv, "training.csv", "cannot be read"),
    ],
)
def test_a_row_without_its_image_or_caption_is_named(
    tmp_path: Path, fault: Callable[[pd.DataFrame, Path], None], named: str, problem: str
) -> None:
    table = training_set(tmp_path, "a cat", "a dog", "a car")
    assert quality.incomplete_rows(table, tmp_path).passed
    fault(table, tmp_path / str(table["training_set"][0]))
    finding = quality.incomplete_rows(table, tmp_path)
    assert not finding.passed
    assert finding.actual == 1
    row = finding.offenders.iloc[0]
    assert row["file_name"] == named
    assert str(row["problem"]).startswith(problem)


def test_a_training_set_that_shrank_names_what_it_lost_and_other_posters_are_no_loss() -> None:
    trained = {f"train/{number}.png": f"poster {number}" for number in range(10)}

    def of(*numbers: int) -> quality.Finding:
        table = pd.DataFrame({"file_name": [f"train/{number}.png" for number in numbers]})
        return quality.shrinkage(table, trained, 0.4)

    assert of(*range(4, 10)).passed
    finding = of(*range(5, 10), 33)
    assert finding.passed and finding.actual == 0.4
    finding = of(*range(5, 10))
    assert not finding.passed
    assert "5 posters to train on, and 10 were trained on last (50.0% fewer" in finding.description
    assert "raise checks.max_lost_share to 1 until" in finding.description
    assert list(finding.offenders["caption"]) == [f"poster {number}" for number in range(5)]
    finding = of(*range(100, 110))
    assert finding.passed and finding.offenders.empty
    assert quality.shrinkage(pd.DataFrame({"file_name": []}), None, 0.4).passed


def test_captions_longer_than_the_text_encoder_reads_are_named(tmp_path: Path) -> None:
    table = training_set(tmp_path, "one two three", "one two", "one two three four")

    def count(text: str) -> int:
        return len(text.split())

    assert quality.long_captions(table, count, 4, 0).passed
    finding = quality.long_captions(table, count, 2, 0.5)
    assert not finding.passed
    assert finding.actual == pytest.approx(2 / 3)
    assert finding.numbers == {"long": 2, "longest": 4}
    assert finding.offenders["tokens"].tolist() == [4, 3]
    assert names_of(finding) == {"train/0.png", "train/2.png"}
    assert quality.long_captions(table, count, 2, 0.7).passed


def holdout(**looks: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "poster_id": [f"held {name}" for name in looks],
            "source_name": [f"{name}.jpg" for name in looks],
            "perceptual_hash": list(looks.values()),
        }
    )


def test_a_poster_in_both_sets_is_found_by_its_bytes(tmp_path: Path) -> None:
    table = training_set(tmp_path, "a cat", "a dog")
    posters = raw_posters("0.png", "1.png")
    held = holdout(other="ffff000000000000")
    assert quality.holdout_overlap(table, posters, held, -1).passed
    # Under the same hash of the bytes, whatever the file is called, and also when it was rejected
    # as a holdout poster, so that its looks are not known.
    held.loc[1] = ["id of 1.png", "copied.png", ""]
    finding = quality.holdout_overlap(table, posters, held, -1)
    assert not finding.passed
    assert finding.actual == 1
    assert finding.offenders.to_dict("records") == [
        {
            "training_poster": "1.png",
            "holdout_poster": "copied.png",
            "problem": "the same bytes",
        }
    ]


def test_a_poster_in_both_sets_is_found_by_its_looks(tmp_path: Path) -> None:
    table = training_set(tmp_path, "a cat", "a dog")
    posters = raw_posters("0.png", "1.png", hashes=["0123456789abcdef", "fedcba9876543210"])
    held = holdout(smaller="0123456789abcdee", unlike="00000000ffffffff")
    assert quality.holdout_overlap(table, posters, held, 0).passed
    finding = quality.holdout_overlap(table, posters, held, 1)
    assert not finding.passed
    assert finding.offenders.to_dict("records") == [
        {
            "training_poster": "0.png",
            "holdout_poster": "smaller.jpg",
            "problem": "the same picture: 1 of 64 bits differ",
        }
    ]
    assert quality.holdout_overlap(table, posters, held, -1).passed


def test_plain_pictures_are_the_same_by_their_bytes_alone(tmp_path: Path) -> None:
    plain = [perceptual_hash(Image.new("RGB", (80, 120), colour)) for colour in ("black", "red")]
    table = training_set(tmp_path, "black", "red")
    posters = raw_posters("0.png", "1.png", hashes=plain)
    blue = perceptual_hash(Image.new("RGB", (60, 90), "blue"))
    held = holdout(night=plain[0], blue=blue)
    assert quality.holdout_overlap(table, posters, held, 4).passed
    held.loc[2] = ["id of 1.png", "copied.png", plain[1]]
    finding = quality.holdout_overlap(table, posters, held, 4)
    assert finding.offenders["problem"].tolist() == ["the same bytes"]


def test_a_duplicate_file_does_not_hide_the_looks_of_its_poster(tmp_path: Path) -> None:
    table = training_set(tmp_path, "a cat")
    used = raw_posters("0.png", hashes=["0123456789abcdef"])
    copy = raw_posters("z copy.png", status="duplicate").assign(poster_id="id of 0.png")
    held = holdout(same="0123456789abcdef")
    posters = pd.concat([used, copy], ignore_index=True)
    assert names_of(quality.holdout_overlap(table, posters, held, 0)) == {"0.png"}


def test_without_holdout_posters_nothing_is_compared_and_the_check_says_so(
    tmp_path: Path, store: Store
) -> None:
    table = training_set(tmp_path, "a cat")
    absent = scan_holdout(
        Folder(tmp_path / "absent", HOLDOUT),
        ImageSettings(),
        store,
        entries=holdout_entries(tmp_path / "absent"),
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("to do: collect some")
    empty = scan_holdout(
        Folder(tmp_path / "empty", HOLDOUT),
        ImageSettings(),
        store,
        entries=holdout_entries(tmp_path / "empty"),
    )
    for held in (absent, empty):
        finding = quality.holdout_overlap(table, raw_posters("0.png"), held, 4)
        assert finding.passed
        assert "no holdout posters" in finding.summary


@UNTIMED
@given(st.lists(HASHES, max_size=12), st.lists(HASHES, max_size=12), st.integers(-1, 40))
def test_the_nearest_hash_within_the_distance_is_found_for_each(
    ours: list[str], theirs: list[str], distance: int
) -> None:
    nearest = [
        min((hash_distance(a, b), other) for other, b in enumerate(theirs)) for a in ours if theirs
    ]
    expected = [
        (place, other, bits) for place, (bits, other) in enumerate(nearest) if bits <= distance
    ]
    assert _nearest(ours, theirs, distance) == expected


def test_nearest_ones_are_found_in_every_part_of_a_large_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality.training_set, "_PAIRS_AT_ONCE", 7)
    ours = [f"{place:016x}" for place in range(10)]
    assert _nearest(ours, ours[:3], 0) == [(0, 0, 0), (1, 1, 0), (2, 2, 0)]


def test_posters_of_one_template_in_both_sets_are_a_row_each(tmp_path: Path) -> None:
    count = 40
    table = training_set(tmp_path, *[f"a cat {place}" for place in range(count)])
    posters = raw_posters(*[f"{place}.png" for place in range(count)], hashes=["1f" * 8] * count)
    held = holdout(**{f"held{place}": "1f" * 8 for place in range(count)})
    finding = quality.holdout_overlap(table, posters, held, 4)
    assert (finding.actual, len(finding.offenders)) == (count, count)


def test_the_starter_posters_and_their_holdout_set_are_apart(tmp_path: Path, store: Store) -> None:
    root = default_root() / "data"
    limits = ImageSettings()
    posters = scan_holdout(
        Folder(root / "raw_posters", HOLDOUT),
        limits,
        store,
        entries=holdout_entries(root / "raw_posters"),
    )
    training = posters[["poster_id"]].assign(file_name="train/x.png")
    held = scan_holdout(
        Folder(root / "holdout_posters", HOLDOUT),
        limits,
        store,
        entries=holdout_entries(root / "holdout_posters"),
    )
    assert quality.holdout_overlap(training, posters, held, 4).passed
    assert quality.near_duplicates(posters, 0.0).passed
    # A small JPEG of a training poster is the same picture.
    shutil.copytree(root / "holdout_posters", tmp_path / "held")
    with Image.open(root / "raw_posters" / "star_sailor.png") as image:
        image.convert("RGB").resize((320, 480)).save(tmp_path / "held" / "ours.jpg", quality=60)
    held = scan_holdout(
        Folder(tmp_path / "held", HOLDOUT),
        limits,
        store,
        entries=holdout_entries(tmp_path / "held"),
    )
    finding = quality.holdout_overlap(training, posters, held, 4)
    assert finding.offenders[["training_poster", "holdout_poster"]].to_numpy().tolist() == [
        ["star_sailor.png", "ours.jpg"]
    ]


# -- generations and scores ------------------------------------------------------------------------

SUITE = pd.DataFrame({"prompt_id": ["cat", "sea"], "seeds": ["[1, 2]", "[1]"]})


def cells(*variants: str) -> pd.DataFrame:
    places = [("cat", 1), ("cat", 2), ("sea", 1)]
    return pd.DataFrame(
        [
            {"variant": v, "prompt_id": p, "seed": s, "status": "ok", "reason": ""}
            for v in variants
            for p, s in places
        ]
    )


def test_every_missing_cell_is_named_with_its_reason() -> None:
    table = cells("sd", "sd_negative")
    assert quality.missing_images(table, SUITE, ("sd", "sd_negative")).passed
    table.loc[0, ["status", "reason"]] = ["blocked", "black image"]
    table.loc[1, ["status", "reason"]] = ["failed", "out of memory"]
    finding = quality.missing_images(table[:-1], SUITE, ("sd", "sd_negative"))
    assert not finding.passed
    assert (finding.expected, finding.actual) == (6, 4)
    assert finding.offenders.to_numpy().tolist() == [
        ["sd", "cat", 2, "out of memory"],
        ["sd_negative", "sea", 1, "not in the table"],
    ]
    assert not quality.missing_images(cells("sd"), SUITE, ("sd", "sd_negative")).passed


def test_prompts_that_share_a_seed_are_named() -> None:
    finding = quality.prompts_sharing_seeds(SUITE)
    assert not finding.passed and finding.actual == 2
    assert finding.offenders.to_numpy().tolist() == [["cat", 1], ["sea", 1]]
    assert "take prompts for independent" in finding.description
    assert quality.prompts_sharing_seeds(SUITE.assign(seeds=["[1, 2]", "[3]"])).passed


def test_delayed_variants_are_expected_of_the_prompts_that_hold_them() -> None:
    suite = pd.DataFrame(
        {"prompt_id": ["cat", "sea"], "seeds": ["[1, 2]", "[3]"], "negative_from": [0.4, math.nan]}
    )
    cells = [("sd", "cat", 1), ("sd", "cat", 2), ("sd", "sea", 3), ("late", "cat", 1)]
    drawn = pd.DataFrame(cells, columns=["variant", "prompt_id", "seed"])
    drawn = drawn.assign(status="ok", reason="")
    finding = quality.missing_images(drawn, suite, ["sd"], ["late"])
    assert finding.offenders.to_numpy().tolist() == [["late", "cat", 2, "not in the table"]]
    assert quality.missing_images(
        drawn, suite.drop(columns="negative_from"), ["sd"], ["late"]
    ).passed


def scores(*values: float, status: str = "ok") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "generation_key": [f"sd {place}" for place in range(len(values))],
            "variant": "sd",
            "prompt_id": [str(place) for place in range(len(values))],
            "seed": 7,
            "clip_cosine": values,
            "status": status,
        }
    )


@UNTIMED
@given(st.lists(st.floats(-1, 1)))
def test_every_cosine_within_its_range_is_possible(values: list[float]) -> None:
    assert quality.impossible_cosines(scores(*values)).passed


@UNTIMED
@given(
    st.floats(allow_nan=True, allow_infinity=True).filter(lambda value: not abs(value) <= 1.001),
    st.lists(st.floats(-1, 1), max_size=3),
)
def test_every_impossible_cosine_is_named(wrong: float, right: list[float]) -> None:
    finding = quality.impossible_cosines(scores(*right, wrong))
    assert not finding.passed
    assert finding.offenders["prompt_id"].tolist() == [str(len(right))]


def test_rounding_of_float32_is_no_fault() -> None:
    assert quality.impossible_cosines(scores(float(np.nextafter(np.float32(1), 2)))).passed


def test_a_blocked_image_has_no_cosine() -> None:
    assert quality.impossible_cosines(scores(math.nan, status="blocked")).passed
    assert not quality.impossible_cosines(scores(0.3, status="blocked")).passed


def freshness(
    table: pd.DataFrame,
    drawn: pd.DataFrame,
    *,
    hours_since_drawn: float = 1,
    days_since_scored: float = 0,
    max_age_days: float | None = None,
) -> Finding:
    return quality.score_freshness(
        table,
        drawn,
        drawn_at=NOON - dt.timedelta(hours=hours_since_drawn),
        scored_at=NOON - dt.timedelta(days=days_since_scored),
        now=NOON,
        max_delay_hours=24,
        max_age_days=max_age_days,
    )


def test_scores_of_the_current_images_are_fresh_however_old() -> None:
    drawn = generations({"0": "ok", "1": "blocked"})
    both = pd.concat([scores(0.3, math.nan)])
    both.loc[1, "status"] = "blocked"
    finding = freshness(both, drawn, hours_since_drawn=9000, days_since_scored=300)
    assert finding.passed
    assert finding.numbers["age_days"] == 300
    assert "300.0 days ago" in finding.summary
    assert not freshness(both, drawn, days_since_scored=8, max_age_days=7).passed
    assert freshness(both, drawn, days_since_scored=6, max_age_days=7).passed


def test_images_may_wait_a_while_for_their_scores_and_then_are_named() -> None:
    drawn = generations({"0": "ok", "1": "ok", "new": "ok"})
    table = scores(0.3, 0.2, 0.1)
    table.loc[1, "status"] = "failed"
    for hours, passed in ((23, True), (25, False)):
        finding = freshness(table, drawn, hours_since_drawn=hours, days_since_scored=2)
        assert finding.passed == passed
        named = zip(finding.offenders["prompt_id"], finding.offenders["problem"], strict=True)
        assert dict(named) == {
            "1": "has no score",
            "new": "has no score",
            "2": "the score of an image that is not current any more",
        }
        assert finding.actual == 1
        assert finding.numbers["behind_hours"] == hours


def test_an_image_that_waits_is_late_however_often_others_are_drawn() -> None:
    drawn = generations({"0": "ok", "new": "ok"})
    since = {str(key): NOON - dt.timedelta(days=20) for key in drawn["generation_key"][1:]}
    for hours, passed in ((25, False), (2, True)):
        finding = quality.score_freshness(
            scores(0.3),
            drawn,
            drawn_at=NOON - dt.timedelta(hours=1),
            waiting_since={key: max(at, NOON - dt.timedelta(hours=hours)) for key, at in
                           since.items()},
            scored_at=NOON,
            now=NOON,
            max_delay_hours=24,
            max_age_days=None,
        )  # fmt: skip
        assert finding.passed == passed
        assert finding.numbers["behind_hours"] == hours


def test_what_fails_shows_a_number_outside_of_what_is_expected() -> None:
    captions = pd.DataFrame(
        {
            "poster_id": [str(number) for number in range(100)],
            "caption": ["a cat cat cat cat cat", *(f"u{n} v{n} w{n}" for n in range(1, 100))],
            "status": "ok",
        }
    )
    finding = quality.repeated_captions(captions, {}, max_repeated_share=0.25, max_shared=0.1)
    assert not finding.passed
    assert finding.expected == "0 repeat themselves, at most 0.1 share one"
    assert finding.actual == "1 repeat themselves, 0 share one"


def test_a_share_of_failed_rows_above_the_limit_is_told_by_name() -> None:
    table = pd.DataFrame(
        {
            "poster_id": [f"id of {number}.png" for number in range(10)],
            "status": ["failed"] * 3 + ["ok"] * 7,
            "reason": ["the device is gone"] * 3 + [""] * 7,
        }
    )
    names = {"id of 0.png": "0.png", "id of 1.png": "1.png"}
    assert quality.failed_share(table, names, 0.3, "captions").passed
    finding = quality.failed_share(table, names, 0.29, "captions")
    assert not finding.passed
    assert (finding.expected, finding.actual) == ("at most 0.29", 0.3)
    assert finding.offenders["source_name"].tolist() == ["0.png", "1.png", "id of 2.png"]
    assert quality.failed_share(table[:0], names, 0, "captions").passed


def test_titles_on_blocked_images_are_among_those_that_were_not_read() -> None:
    table = pd.DataFrame(
        {
            "generation_key": list("abcd"), "lettering": "set", "title": "Sea",
            "status": ["ok", "ok", "ok", "blocked"], "read": ["SEA", "SEA", "SEA", ""],
            "distance": [0.0, 0.0, 0.0, np.nan], "exact": [True, True, True, False],
        }
    )  # fmt: skip
    finding = quality.unread_titles(table, 0.9)
    assert not finding.passed and finding.actual == 0.75
    assert finding.offenders["generation_key"].tolist() == ["d"]


def test_titles_whose_letters_the_ocr_does_not_know_are_not_among_those_it_did_not_read() -> None:
    table = pd.DataFrame(
        {
            "generation_key": list("abcd"), "lettering": ["set", "set", "drawn", "drawn"],
            "title": ["Sea", "바다"] * 2, "status": ["ok", "blocked"] * 2,
            "read": ["SEA", ""] * 2, "distance": [0.0, np.nan] * 2, "exact": [True, False] * 2,
            "measurable": [True, False] * 2,
        }
    )  # fmt: skip
    finding = quality.unread_titles(table, 1)
    assert finding.passed and finding.actual == 1 and finding.offenders.empty
    assert "100.0% of 1 titles" in finding.summary and "of 1 more" in finding.summary
    assert quality.unread_titles(table[~table["measurable"]], 1).passed, "nothing to say"
