"""What the tables and columns of the warehouse mean, in words that analysts find in the database.

What belongs here: a text for each table, view and column that `warehouse` defines, and writing
texts into a database as comments. What does not: the definitions (`warehouse`), and the texts of
reports, which dbt writes from the descriptions of its models.
"""

from __future__ import annotations

from collections.abc import Mapping

import duckdb

_OFTEN = {
    "checkpoint_id": "The checkpoint, or the fingerprint of a base model.",
    "environment_id": "Key of the versions of code and packages, in dim_environment.",
    "first_seen_at": "When it was first written down (UTC).",
    "generation_key": "The image and what it is scored against; `posterpipe trace` takes it.",
    "metric_id": "The metric, as in dim_metric.",
    "pixel_key": "What decides the pixels of the image.",
    "prompt_id": "The prompt in the suite.",
    "prompt_key": "The wording of the prompt, in dim_prompt.",
    "recorded_at": "When the row was written (UTC).",
    "run_id": "The Dagster run that wrote the row.",
    "variant": "sd (base model), sd_negative (with negative prompt), dreambooth (fine-tuned), "
    "dreambooth_negative (both); ..._delayed where the negative prompt acts later.",
}
"""Texts of columns that have the same name and meaning in several tables."""

TABLE = ""
"""Stands for the table itself among the names of its columns."""

COMMENTS: dict[str, dict[str, str]] = {
    "schema_version": {
        TABLE: "Versions of the schema that the warehouse has had; the highest one is its own.",
        "version": "Version of the schema.",
    },
    "fct_image": {
        TABLE: "Every generated image, those of before included. One row an image.",
        "negative_prompt": "What the model was steered away from; empty for none.",
        "seed": "Seed of the noise, the same for all variants.",
        "image": "sha256 of the PNG; empty where nothing was drawn.",
        "image_path": "Path of the PNG inside the store; empty where nothing was drawn.",
        "status": "ok, blocked (black or of one colour) or failed (not drawn).",
        "reason": "Why it is not ok; empty for ok.",
        "width": "Pixels; NULL where nothing was drawn.",
        "height": "Pixels; NULL where nothing was drawn.",
        "settings": "How it was sampled (JSON): scheduler, steps, guidance, size, precision.",
    },
    "fct_score": {
        TABLE: "Every score, those of earlier images and metrics included. One row an image and "
        "metric.",
        "value": "The score, in the unit that dim_metric tells; NULL unless the status is ok.",
        "status": "ok, blocked (the image is black or of one colour) or failed (not scored).",
        "reason": "Why there is no score; empty for ok.",
        "scored_at": "When it was scored (UTC).",
    },
    "dim_prompt": {
        TABLE: "Prompts. One row a wording: a reworded prompt is a new row of the same prompt_id.",
        "prompt_key": "Key of the wording.",
        "prompt": "What the model was given.",
        "score_text": "The natural words that the image is scored against.",
        "title": "What the poster should be called; empty for none.",
    },
    "dim_checkpoint": {
        TABLE: "Models that images were drawn with. One row a model.",
        "kind": "base or tuned.",
        "base_model": "Fingerprint of the model that it was tuned from; NULL for a base model.",
        "training_set_version": "Key of the training set; NULL for a base model.",
        "settings": "Settings of the training (JSON); NULL for a base model.",
        "trained_at": "When it was trained (UTC); NULL for a base model.",
        "run_id": "The Dagster run that trained it; of a base model, the one that wrote the row.",
    },
    "dim_metric": {
        TABLE: "What a metric_id means. One row a metric; a changed metric is a new one.",
        "metric_id": "Key of the metric.",
        "name": "What it is called, whatever its encoder.",
        "encoder": "Id of the model behind it; empty where none is asked.",
        "revision": "Commit or fingerprint of that model; empty where it has none.",
        "preprocessing": "What is done to an image first; of CLIP's, crop shows its middle and "
        "pad all of it.",
        "version": "Version of how it is computed.",
        "description": "What it measures, with unit and range.",
    },
    "fct_promotion": {
        TABLE: "Decisions about which checkpoint is served; the report gate_decisions tells them "
        "with their numbers. One row a decision.",
        "decision_id": "Key of the decision.",
        "decided_at": "When (UTC).",
        "checkpoint_id": "The checkpoint that was judged or pinned.",
        "champion_before": "What was served until then.",
        "decision": "promote, hold or reject.",
        "reason": "What decided, in words.",
        "numbers": "What it was decided by (JSON).",
        "decided_by": "gate, or the name of the person.",
        "run_id": "The Dagster run of the decision; NULL where a person decided.",
        "base_model": "The base model whose champion it is about; NULL where that is not known.",
    },
    "fct_drawing": {
        TABLE: "Which run drew an image. One row a set of pixels.",
        "run_id": "The Dagster run that drew it.",
        "drawn_at": "When it was drawn (UTC).",
    },
    "dim_environment": {
        TABLE: "Versions of code and packages that runs worked with. One row a combination.",
        "environment_id": "Key of the combination.",
        "posterpipe": "Version of posterpipe.",
        "source": "Hash of its source files.",
        "commit_id": "Commit of the checkout; empty outside of one.",
        "python": "Version of Python.",
        "platform": "Operating system and processor.",
        "packages": "Versions by package (JSON).",
    },
    "run_environment": {
        TABLE: "Which environments a run worked in. One row a run and environment.",
        "run_id": "The Dagster run.",
    },
    "fct_nearest": {
        TABLE: "The training poster that an image is nearest to. One row an image and encoder; the "
        "latest measurement.",
        "metric_id": "The metric of the similarity, as in dim_metric.",
        "nearest_poster": "sha256 of the nearest training image.",
        "similarity": "Cosine with it, -1 to 1.",
        "similarity_threshold": "The cosine from which that counts as a copy; NULL where too few "
        "posters were compared to know.",
        "hash_poster": "sha256 of the training image with the nearest perceptual hash.",
        "hash_distance": "Bits of 64 in which its perceptual hash differs.",
        "hash_threshold": "The distance up to which that counts as a copy.",
        "copy_sensitivity": "Share of training posters, cut and compressed a bit, that the "
        "threshold finds, 0 to 1; NULL without a threshold.",
        "copied": "Whether either of the two says that the image is a copy.",
        "measured_at": "When it was measured (UTC).",
    },
    "fct_title": {
        TABLE: "The title set in type on an image. One row an image that is lettered.",
        "title": "The title.",
        "image": "sha256 of the titled PNG; empty where no title was set.",
        "image_path": "Path of that PNG inside the store; empty where no title was set.",
        "style": "Style of the lettering.",
        "cap_height": "Height of its capitals, in pixels of the titled image.",
        "contrast": "Least contrast of letters and ground, 1 to 21 (WCAG).",
        "scrim": "Whether the ground had to be made darker or lighter.",
        "covered": "Share of the main object below the title, 0 to 1.",
        "status": "ok, blocked (the image is black or of one colour) or failed (not set).",
        "reason": "Why it is not ok; empty for ok.",
        "set_at": "When it was set (UTC).",
    },
    "fct_reading": {
        TABLE: "What the OCR read on an image. One row an image and lettering; the latest reading.",
        "lettering": "drawn (by the model) or set (in type, afterwards).",
        "title": "What it should have read.",
        "read": "What it read.",
        "distance": "Normalised edit distance of the two, 0 (equal) to 1.",
        "exact": "Whether it read the title exactly.",
        "read_at": "When it was read (UTC).",
    },
    "current_generation": {
        TABLE: "The images that the pipeline draws now; reports are about them. One row an image.",
    },
    "current_metric": {
        TABLE: "The metrics that the pipeline uses now. One row a scoring step and metric.",
        "step": "The asset that scores by it.",
        "place": "Its place among the step's metrics, from 1.",
    },
    "current_poster": {
        TABLE: "The posters as they are now, with their captions. One row a file.",
        "poster_id": "sha256 of the file; empty where it cannot be read.",
        "source_name": "Path of the file inside the landing folder.",
        "status": "ok, rejected or duplicate.",
        "reason": "Why it is not ok; empty for ok.",
        "format": "Format of the file.",
        "width": "Pixels of the poster as it was found.",
        "height": "Pixels of the poster as it was found.",
        "size_bytes": "Size of the file.",
        "near_duplicate_of": "The first poster that looks almost the same; empty for none.",
        "image": "sha256 of the training image that was made of it; NULL without one.",
        "image_path": "Path of that image inside the store; NULL without one.",
        "caption": "Its caption; NULL without one.",
        "caption_source": "human or model.",
        "caption_status": "ok or failed; NULL where nobody was to caption it.",
        "caption_reason": "Why it failed, or what is to be known of the caption; else empty.",
        "in_training_set": "Whether it is in the training set.",
    },
    "clip_scores": {
        TABLE: "CLIP scores with their images and prompts, those of before included. One row an "
        "image and CLIP metric: each image as often as there are such metrics.",
        "prompt": "What the model was given.",
        "seed": "Seed of the noise, the same for all variants.",
        "clip_cosine": "Raw cosine of image and score text, -1 to 1; NULL without a score.",
        "clip_score": "2.5 x max(cosine, 0), the scale of Hessel et al.; NULL without a score.",
        "image_path": "Path of the PNG inside the store.",
        "scored_at": "When it was scored (UTC).",
        "run_id": "The Dagster run that scored it.",
        "is_current": "Whether the pipeline draws the image now.",
        "status": "ok, blocked (the image is black or of one colour) or failed (not scored).",
    },
}
"""By table, then by column; columns that are not named here have their text in `_OFTEN`."""


def describe_warehouse(connection: duckdb.DuckDBPyConnection, database: str) -> None:
    """Writes the texts into an attached copy of the warehouse.

    Tables and columns that an older schema lacks, or that a newer one adds, are passed over.
    """
    columns = connection.execute(
        "SELECT table_name, list(column_name) FROM duckdb_columns() "
        "WHERE database_name = ? AND schema_name = 'main' GROUP BY table_name",
        [database],
    ).fetchall()
    # One transaction: otherwise each text would wait for the disk.
    connection.begin()
    for table, names in columns:
        if own := COMMENTS.get(table):
            known = _OFTEN | own
            texts = {name: known[name] for name in (TABLE, *names) if name in known}
            comment_on(connection, database, table, texts)
    connection.commit()


def comment_on(
    connection: duckdb.DuckDBPyConnection, database: str, table: str, texts: Mapping[str, str]
) -> None:
    """Writes the text of a table or view (TABLE) and those of its columns into a database."""
    views = connection.execute(
        "SELECT count(*) FROM duckdb_views() WHERE database_name = ? AND view_name = ?",
        [database, table],
    ).fetchall()[0][0]
    place = f'"{database}".main."{table}"'
    for name, text in texts.items():
        kind = "VIEW" if views else "TABLE"
        what = f'COLUMN {place}."{name}"' if name else f"{kind} {place}"
        quoted = text.replace("'", "''")
        connection.execute(f"COMMENT ON {what} IS '{quoted}'")
