"""The pages of the report, rendered.

What belongs here: which pages there are, and the templates' environment. What does not: what stands
on them (`results`, `gallery_pages`, and `<template>_page` of the others), queries (`data`), SVG
(`charts`), markup and style (the templates, `report.css`).

Everything that comes from outside (prompts, reasons, names) reaches the templates as plain text,
and they escape all of it; only `charts` makes markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from posterpipe.core.score_report import charts
from posterpipe.core.score_report.copying_page import copying_context
from posterpipe.core.score_report.data import Published
from posterpipe.core.score_report.data_page import data_context
from posterpipe.core.score_report.gallery_pages import GALLERY_FILE, gallery_contexts
from posterpipe.core.score_report.gate_page import gate_context
from posterpipe.core.score_report.glossary_page import glossary_context
from posterpipe.core.score_report.legibility_page import legibility_context
from posterpipe.core.score_report.pictures import Pictures
from posterpipe.core.score_report.results_page import index_context
from posterpipe.core.score_report.words import moment

SITE = "Posters and scores"


@dataclass(frozen=True)
class Page:
    """One file of the report."""

    file: str
    short: str
    """In the navigation."""
    title: str


INDEX = Page("index.html", "Results", "Results")
GALLERY = Page(GALLERY_FILE, "Gallery", "Gallery")
COPYING = Page("copying.html", "Copies", "Overfitting and copies")
LEGIBILITY = Page("legibility.html", "Legibility", "Legibility")
GATE = Page("gate.html", "Gate", "Gate log")
DATA = Page("data.html", "Data", "Data quality")
GLOSSARY = Page("glossary.html", "Glossary", "Glossary")
PAGES = (INDEX, GALLERY, COPYING, LEGIBILITY, GATE, DATA, GLOSSARY)


def render(published: Published, pictures: Pictures) -> dict[str, str]:
    """The HTML of every page, by file name."""
    told_at = moment(published.scored_at) if published.scored_at else ""
    environment = _environment()
    environment.globals |= {
        "site": SITE, "pages": PAGES, "told_at": told_at,
        "version": installed_version("posterpipe"),
    }  # fmt: skip
    rendered: dict[str, str] = {}

    def add(page: Page, template: str, context: Mapping[str, Any]) -> None:
        rendered[page.file] = environment.get_template(template).render(page=page, **context)

    add(INDEX, "index.html.j2", index_context(published, pictures))
    for file, context in gallery_contexts(published, pictures):
        add(Page(file, GALLERY.short, GALLERY.title), "gallery.html.j2", context)
    add(COPYING, "copying.html.j2", copying_context(published, pictures))
    add(LEGIBILITY, "legibility.html.j2", legibility_context(published, pictures))
    add(GATE, "gate.html.j2", gate_context(published))
    add(DATA, "data.html.j2", data_context(published))
    add(GLOSSARY, "glossary.html.j2", glossary_context(published))
    return rendered


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": charts.signed, "plain": charts.plain, "variant_class": charts.variant_class,
    }  # fmt: skip
    return environment
