"""The published scores, as pages show them.

What belongs here: whether there is a new publication, the leaderboard, and which images there are.
What does not: how scores are made and published (`core.warehouse.publication`), what reports say
of them (`dbt_like_reports`), and pages.

Each answer opens the file, asks, and closes it: a publication replaces the file, and who holds the
old one open would go on reading it.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pandas as pd

from posterpipe.core.errors import first_line
from posterpipe.core.files import Signature, file_signature

GALLERY = """
SELECT
    image.variant,
    image.prompt_id,
    prompt.prompt,
    image.seed,
    image.checkpoint_id,
    score.metric_id,
    score.value AS clip_cosine,
    image.image_path,
    image.status,
    image.reason,
    image.generation_key
FROM fct_image AS image
JOIN dim_prompt AS prompt ON prompt.prompt_key = image.prompt_key
JOIN (SELECT DISTINCT generation_key FROM current_generation) AS now
    ON now.generation_key = image.generation_key
LEFT JOIN fct_score AS score
    ON score.generation_key = image.generation_key AND score.metric_id = ?
    -- As in reports: scores of titles that were taken off an image stay, and do not count.
    AND (
        NOT starts_with(score.metric_id, 'title_')
        OR image.generation_key IN (SELECT generation_key FROM fct_title)
    )
WHERE image.prompt_id = ?
ORDER BY image.seed, image.variant
"""


class PublishedError(Exception):
    """The published file cannot be read. The message names it and says what to do."""


class Published:
    """The analysts' database."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn = threading.Lock()

    def signature(self) -> Signature | None:
        """What changes with each publication; None before the first."""
        return file_signature(self.path)

    def published_at(self) -> dt.datetime | None:
        """When the file was written, UTC."""
        signature = self.signature()
        return dt.datetime.fromtimestamp(signature[0] / 1e9, dt.UTC) if signature else None

    def leaderboard(self) -> pd.DataFrame | None:
        """The report `leaderboard` as dbt wrote it, None where it was not published."""
        if not self._ask(
            "SELECT 1 FROM information_schema.tables WHERE table_name = 'leaderboard'"
        ).shape[0]:
            return None
        return self._ask("SELECT * FROM leaderboard")

    def prompts(self) -> pd.DataFrame:
        """prompt_id and prompt of the images that reports are about, in the order of their ids."""
        return self._ask(
            """
            SELECT DISTINCT image.prompt_id, prompt.prompt
            FROM fct_image AS image
            JOIN dim_prompt AS prompt ON prompt.prompt_key = image.prompt_key
            JOIN current_generation AS now ON now.generation_key = image.generation_key
            ORDER BY image.prompt_id
            """
        )

    def images(self, prompt_id: str, metric_id: str) -> pd.DataFrame:
        """The images of a prompt in all variants and seeds, with their score by a metric."""
        return self._ask(GALLERY, [metric_id, prompt_id])

    def clip_metrics(self) -> list[str]:
        """The metrics of clip_scores, the one with most current scores first."""
        found = self._ask(
            "SELECT metric_id FROM clip_scores WHERE is_current GROUP BY metric_id "
            "ORDER BY count(*) DESC, metric_id"
        )
        return [str(name) for name in found["metric_id"]]

    def _ask(self, query: str, values: Sequence[object] = ()) -> pd.DataFrame:
        try:
            # One at a time: DuckDB gives a second connection of this process the file that the
            # first one opened, were it replaced in between.
            with self._turn, duckdb.connect(str(self.path), read_only=True) as connection:
                return connection.execute(query, list(values)).df()
        except duckdb.Error as error:
            raise PublishedError(
                f"{self.path}: the published scores cannot be read ({first_line(error)}); "
                "materialize published_scores again"
            ) from error
