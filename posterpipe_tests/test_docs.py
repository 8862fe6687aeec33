"""What README and guides say is so: commands, settings, files, links, code and queries.

Blocks of code are run where they can be: Python in this process, SQL on a small published
database. Of shell commands it is checked that program, subcommand, option, target, module and
variable exist; what they do has tests of its own.
"""

from __future__ import annotations

import ast
import csv
import datetime as dt
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import duckdb
import pytest
import yaml
from typer.main import get_command

from posterpipe.cli import app
from posterpipe.core.prompts import load_suite
from posterpipe.setting_types import Group
from posterpipe.settings import Settings, default_root, load_settings
from posterpipe.training_settings import TrainingSettings

ROOT = default_root()
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
LARGEST_PICTURE = 400_000
LANGUAGES = ("sh", "python", "sql", "toml", "yaml", "csv", "mermaid", "nginx", "")

PROGRAMS = {
    "cp", "mv", "cd", "curl", "duckdb", "git", "rm", "pip", "accelerate", "docker", "psql",
    "useradd", "chown", "runuser", "install", "systemctl",
}  # fmt: skip
"""What a reader's machine brings, or a package; nothing of it is checked further."""

VARIABLES = {"POSTERPIPE_TEST_BROWSER", "POSTERPIPE_WAREHOUSE"}
"""Variables that are no settings: of the browser tests, and of the dbt project."""

COMPUTED = ("data/store", "data/captions.csv", "docs/_build", "dbt_like_reports/target")
"""Paths that are there only after something ran, or where someone wrote them."""


TAGS = {
    tag
    for module in (ROOT / "posterpipe" / "defs").glob("*.py")
    for tag in re.findall(r'"(posterpipe/\w+)"', module.read_text("utf-8"))
}
"""Tags of runs, which look like paths."""

FILE_ENDINGS = (".csv", ".html", ".json", ".md", ".parquet", ".png", ".py", ".toml", ".yaml")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of all pages that are in one of these languages; all without any."""
    found = []
    for page in PAGES:
        lines = page.read_text("utf-8").splitlines()
        start, language = 0, None
        for number, line in enumerate(lines, 1):
            fence = re.match(r"\s*```(.*)$", line)
            if fence and language is None:
                start, language = number, fence[1].strip()
            elif fence:
                text = "\n".join(lines[start : number - 1]) + "\n"
                found.append(Block(page, start + 1, str(language), text))
                language = None
        assert language is None, f"{page}:{start}: a block without an end"
    return [block for block in found if not languages or block.language in languages]


def pages_with(language: str) -> list[Path]:
    """The pages that have a block in a language."""
    return list(dict.fromkeys(block.page for block in blocks(language)))


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", page.read_text("utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), flags=re.M):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading).lower())
        slug, number = words.replace(" ", "-"), 0
        anchor = slug
        while anchor in found:
            number += 1
            anchor = f"{slug}-{number}"
        found.add(anchor)
    return found


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("POSTERPIPE_")]:
        monkeypatch.delenv(name)


def test_every_block_says_what_it_is() -> None:
    for block in blocks():
        assert block.language in LANGUAGES, f"{block}: {block.language}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            assert not picture, f"{page.name}: {target}: a picture of someone else's"
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"
        if picture:
            assert file.stat().st_size < LARGEST_PICTURE, f"{target} is too large to be quick"


def test_every_picture_is_described_and_shown_somewhere() -> None:
    texts = {page: page.read_text("utf-8") for page in PAGES}
    for page, text in texts.items():
        for description in re.findall(r"!\[([^\]]*)\]", text):
            assert len(description) > 10, f"{page.name}: a picture without a description"
    for picture in (ROOT / "docs").rglob("*.png"):
        if "_build" not in picture.parts:
            assert any(picture.name in text for text in texts.values()), picture.name


def test_every_guide_can_be_found() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    for page in PAGES[1:]:
        path = os.path.relpath(page, ROOT / "docs")
        assert page.name == "README.md" or f"]({path})" in index, page.name
    assert "(docs/README.md)" in (ROOT / "README.md").read_text("utf-8")


def commands() -> Iterator[tuple[Block, dict[str, str], list[str]]]:
    """Every command of the shell blocks: its variables, and its words."""
    for block in blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            variables = {}
            while words and (words[0] == "export" or re.match(r"[A-Z_]+=", words[0])):
                word = words.pop(0)
                if word != "export":
                    name, _, value = word.partition("=")
                    variables[name] = value
            if words or variables:
                yield block, variables, words


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    subcommands = get_command(app).commands  # type: ignore[attr-defined]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    checked = 0
    for block, _, words in commands():
        if not words:
            continue
        program = words[0].removeprefix(".venv/bin/")
        where = f"{block}: {' '.join(words)}"
        if program == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, where
        elif program == "posterpipe":
            assert words[1] in subcommands, where
            command, rest = subcommands[words[1]], words[2:]
            while rest and rest[0] in getattr(command, "commands", {}):
                command, rest = command.commands[rest[0]], rest[1:]
            options = {
                name for each in command.params for name in (*each.opts, *each.secondary_opts)
            }
            given = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert given <= options | {"--help"}, where
        elif program in ("python", "accelerate"):
            if "-m" in words:
                assert find_spec(words[words.index("-m") + 1]), where
            else:
                assert (ROOT / words[1]).exists(), where
        elif program == "dbt":
            assert words[1] in ("build", "run", "test", "parse", "compile", "show"), where
        elif program == "pip":
            for extra in re.findall(r"(?:posterpipe|\.)\[(\w+)\]", " ".join(words)):
                assert extra in extras, where
        else:
            assert program in PROGRAMS, f"{where}: what is {program}?"
        for word in words[1:]:
            if "/" in word and word.startswith(("data/", "docs/", "posterpipe/", "deploy/")):
                known = any(ROOT.glob(word)) or word.startswith(COMPUTED)
                assert known, f"{where}: {word}"
        checked += 1
    assert checked > 15


def test_variables_are_settings_and_their_values_are_accepted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What a block sets, it sets together.
    by_block: dict[Block, dict[str, str]] = {}
    for block, variables, _ in commands():
        by_block.setdefault(block, {}).update(variables)
    not_compared = {"POSTERPIPE_PROFILE", *VARIABLES}
    checked = 0
    for block, variables in by_block.items():
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                if name == "POSTERPIPE_PROFILE" and value.endswith(".toml"):
                    value = str(ROOT / "posterpipe" / "profiles" / "sd21.toml")
                if name.startswith("POSTERPIPE_") and name not in VARIABLES:
                    patch.setenv(name, value)
                    checked += 1
            settings = load_settings()
            for name, value in variables.items():
                if name.startswith("POSTERPIPE_") and name not in not_compared:
                    found: object = settings
                    for part in name.removeprefix("POSTERPIPE_").lower().split("__"):
                        found = getattr(found, part)
                    assert found != "" and found is not None, f"{block}: {name}={value}"
    assert checked > 15


def settings_names(group: type = Settings, prefix: str = "") -> set[str]:
    """Every setting and group, with points."""
    names = set()
    for name, field in group.model_fields.items():  # type: ignore[attr-defined]
        names.add(prefix + name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Group):
            names |= settings_names(kind, f"{prefix}{name}.")
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_files_that_are_named_exist(page: Path) -> None:
    names = settings_names()
    groups = {name.partition(".")[0] for name in names if "." in name}
    text = page.read_text("utf-8")
    for name in set(re.findall(r"POSTERPIPE_[A-Z_]+[A-Z]", text)) - VARIABLES:
        setting = name.removeprefix("POSTERPIPE_").lower().replace("__", ".")
        assert setting in names, name
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        is_file = code.endswith(FILE_ENDINGS)
        if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", code) and not is_file:
            assert code.split(".")[0] not in groups or code in names, f"{page.name}: {code}"
        starts = ("data/", "docs/", "posterpipe/", "deploy/", "benchmarks/", "dbt_like_reports/")
        if code.startswith(starts) and re.fullmatch(r"[\w./-]+", code):
            known = (ROOT / code).exists() or code.startswith(COMPUTED) or code in TAGS
            assert known, f"{page.name}: {code}"


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_python_runs(
    page: Path, tmp_path: Path, published_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = [block.text for block in blocks("python") if block.page == page]
    if "data/store" in "".join(code):
        monkeypatch.chdir(published(tmp_path, published_world))
    else:
        monkeypatch.chdir(ROOT)
    script = tmp_path / "page.py"
    script.write_text("\n".join(code), "utf-8")
    runpy.run_path(str(script))


def published(folder: Path, world: Path) -> Path:
    """A folder with a small study's publication where the guides have it."""
    store = folder / "data" / "store"
    store.parent.mkdir()
    store.symlink_to(world)
    return folder


@pytest.mark.parametrize("page", pages_with("sql"), ids=lambda page: page.name)
def test_queries_find_something_in_a_published_database(page: Path, published_world: Path) -> None:
    queries = [block for block in blocks("sql") if block.page == page]
    database = published_world / "public" / "scores.duckdb"
    with duckdb.connect(str(database), read_only=True) as connection:
        for block in queries:
            if "{{" in block.text:
                continue  # a model for dbt, which its own tests run
            for statement in duckdb.extract_statements(block.text):
                result = connection.execute(statement)
                assert result.description and result.fetchall(), f"{block}: {statement.query}"


def test_ages_are_the_same_in_every_time_zone(published_world: Path) -> None:
    database = published_world / "public" / "scores.duckdb"
    with duckdb.connect(str(database), read_only=True) as connection:
        ((comment,),) = connection.execute(
            "SELECT comment FROM duckdb_tables() WHERE table_name = 'freshness'"
        ).fetchall()
        queries = re.findall("`(select [^`]+)`", comment)
        for block in blocks("sql"):
            found = duckdb.extract_statements(block.text) if "latest_at" in block.text else []
            queries += [each.query for each in found if "latest_at" in each.query]
        assert len(queries) >= 2
        for query in queries:
            ages = []
            for zone in ("UTC", "Pacific/Kiritimati"):
                connection.execute(f"SET TimeZone = '{zone}'")
                ages.append(dict(row[:: len(row) - 1] for row in connection.sql(query).fetchall()))
            assert abs(ages[0]["scores"] - ages[1]["scores"]) < dt.timedelta(hours=1), query


def test_the_query_of_the_readme_gives_every_image_once_by_the_metric_of_the_leaderboard(
    published_world: Path,
) -> None:
    (block,) = (block for block in blocks("sql") if block.page == ROOT / "README.md")
    database = published_world / "public" / "scores.duckdb"
    with duckdb.connect(str(database), read_only=True) as connection:
        shown = connection.sql(block.text.rstrip().rstrip(";")).df()
        images = connection.sql("select count(*) from prompt_drilldown").fetchall()
        means = connection.sql("select variant, mean from leaderboard where is_headline").fetchall()
    assert not shown.duplicated(["variant", "prompt_id", "seed"]).any()
    assert [(len(shown),)] == images
    # Seeds are averaged within a prompt first, as the leaderboard does.
    by_prompt = shown.groupby(["variant", "prompt_id"])["clip_cosine"].mean()
    assert by_prompt.groupby("variant").mean().to_dict() == pytest.approx(dict(means), abs=1e-5)


def test_every_table_and_column_is_described_in_the_database_itself(published_world: Path) -> None:
    database = published_world / "public" / "scores.duckdb"
    with duckdb.connect(str(database), read_only=True) as connection:
        undescribed = connection.execute(
            """
            SELECT table_name, column_name FROM duckdb_columns()
            WHERE NOT internal AND comment IS NULL
            UNION ALL
            SELECT table_name, '' FROM duckdb_tables() WHERE NOT internal AND comment IS NULL
            UNION ALL
            SELECT view_name, '' FROM duckdb_views() WHERE NOT internal AND comment IS NULL
            """
        ).fetchall()
    assert undescribed == []


def test_toml_is_made_of_settings() -> None:
    for block in blocks("toml"):
        values = tomllib.loads(block.text)
        TrainingSettings(**values.get("training", {}))
        if "output_dir" not in values:  # of the trainer alone
            assert set(values) <= set(Settings.model_fields), str(block)


def test_suites_are_accepted(tmp_path: Path) -> None:
    checked = 0
    for block in blocks("yaml"):
        if "prompts" in yaml.safe_load(block.text):
            suite = tmp_path / "suite.yaml"
            suite.write_text(block.text, "utf-8")
            assert load_suite(suite)
            checked += 1
    assert checked


def test_csv_has_a_value_in_every_column() -> None:
    for block in blocks("csv"):
        header, *rows = csv.reader(io.StringIO(block.text))
        assert rows and all(len(row) == len(header) and all(row) for row in rows), str(block)


def test_what_follows_from_the_code_is_as_the_code_is() -> None:
    """Where this fails: python -m docs.tools.pages"""
    result = subprocess.run(
        [sys.executable, "-m", "docs.tools.pages", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_says_what_belongs_there_and_what_does_not() -> None:
    for module in sorted((ROOT / "posterpipe").rglob("*.py")):
        said = " ".join((ast.get_docstring(ast.parse(module.read_text("utf-8"))) or "").split())
        assert "What belongs here: " in said and "What does not: " in said, module


@pytest.mark.slow
def test_the_reference_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "docs.tools.reference", "--target", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "posterpipe" / "core" / "store.html").read_text("utf-8")
    assert "What belongs here" in page
