"""The schema of the warehouse: its tables and their columns, each with what it means.

What belongs here: the definitions, beside each the comment that analysts find in the database, and
bringing a database of any earlier schema to this one. What does not: the file (`database`), its
rows (`rows`), and the comments of reports, which dbt writes from the descriptions of its
models.

Tables (times are UTC; `run_id` names the Dagster run that wrote the row):

    fct_image           one row a generated image, key generation_key
    fct_score           one row a number, key (generation_key, metric_id), value NULL unless ok
    dim_prompt          prompts, key prompt_key: a reworded prompt is a new row of the same id
    dim_checkpoint      models that images were drawn with
    dim_metric          what a metric_id means
    fct_promotion       decisions about which checkpoint is served, of each base model
    fct_drawing         which run drew some pixels, key pixel_key
    dim_environment     versions of code and packages, key environment_id
    run_environment     which environments a run worked in
    fct_nearest         the training poster an image is nearest to, key (generation_key, metric_id)
    fct_title           the title set in type on an image, key generation_key
    fct_reading         what the OCR read on an image, key (generation_key, lettering)
    current_generation  the images that the latest tables of generations name
    current_metric      the metrics that each scoring step used last
    current_poster      the posters as they are now, with their captions
    clip_scores         the view that most analysts read
"""

from __future__ import annotations

from collections.abc import Mapping

import duckdb

SCHEMA_VERSION = 5
"""2 added fct_drawing, dim_environment and run_environment; 3 added fct_nearest, fct_title,
fct_reading, current_metric and current_poster; 4 added fct_promotion.base_model; 5 added
fct_nearest.copy_sensitivity. Every version so far only added tables and columns: files of an older
one are brought up to date by creating what is missing."""

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

_VERSIONS = """
CREATE TABLE IF NOT EXISTS schema_version (
    -- Versions of the schema that the warehouse has had; the highest one is its own.
    version INTEGER NOT NULL
    -- Version of the schema.
);
"""

_TABLES = """
CREATE TABLE IF NOT EXISTS fct_image (
    -- Every generated image, those of before included. One row an image.
    generation_key  VARCHAR NOT NULL,
    pixel_key       VARCHAR NOT NULL,
    variant         VARCHAR NOT NULL,
    prompt_key      VARCHAR NOT NULL,
    prompt_id       VARCHAR NOT NULL,
    negative_prompt VARCHAR NOT NULL,
    -- What the model was steered away from; empty for none.
    seed            BIGINT NOT NULL,
    -- Seed of the noise, the same for all variants.
    checkpoint_id   VARCHAR NOT NULL,
    image           VARCHAR NOT NULL,
    -- sha256 of the PNG; empty where nothing was drawn.
    image_path      VARCHAR NOT NULL,
    -- Path of the PNG inside the store; empty where nothing was drawn.
    status          VARCHAR NOT NULL CHECK (status IN ('ok', 'blocked', 'failed')),
    -- ok, blocked (black or of one colour) or failed (not drawn).
    reason          VARCHAR NOT NULL,
    -- Why it is not ok; empty for ok.
    width           INTEGER,
    -- Pixels; NULL where nothing was drawn.
    height          INTEGER,
    -- Pixels; NULL where nothing was drawn.
    settings        VARCHAR,
    -- How it was sampled (JSON): scheduler, steps, guidance, size, precision.
    run_id          VARCHAR,
    recorded_at     TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS fct_score (
    -- Every score, those of earlier images and metrics included. One row an image and metric.
    generation_key  VARCHAR NOT NULL,
    metric_id       VARCHAR NOT NULL,
    value           DOUBLE,
    -- The score, in the unit that dim_metric tells; NULL unless the status is ok.
    status          VARCHAR NOT NULL CHECK (status IN ('ok', 'blocked', 'failed')),
    -- ok, blocked (there is nothing to measure: the image is black or of one colour, or the title
    -- is in letters that the OCR does not know) or failed (not scored).
    reason          VARCHAR NOT NULL,
    -- Why there is no score; empty for ok.
    scored_at       TIMESTAMP NOT NULL,
    -- When it was scored (UTC).
    run_id          VARCHAR,
    CHECK ((status = 'ok') = (value IS NOT NULL))
);
CREATE TABLE IF NOT EXISTS dim_prompt (
    -- Prompts. One row a wording: a reworded prompt is a new row of the same prompt_id.
    prompt_key      VARCHAR PRIMARY KEY,
    -- Key of the wording.
    prompt_id       VARCHAR NOT NULL,
    prompt          VARCHAR NOT NULL,
    -- What the model was given.
    score_text      VARCHAR NOT NULL,
    -- The natural words that the image is scored against.
    title           VARCHAR NOT NULL,
    -- What the poster should be called; empty for none.
    first_seen_at   TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS dim_checkpoint (
    -- Models that images were drawn with. One row a model.
    checkpoint_id        VARCHAR PRIMARY KEY,
    kind                 VARCHAR NOT NULL CHECK (kind IN ('base', 'tuned')),
    -- base or tuned.
    base_model           VARCHAR,
    -- Fingerprint of the model that it was tuned from; NULL for a base model.
    training_set_version VARCHAR,
    -- Key of the training set; NULL for a base model.
    settings             VARCHAR,
    -- Settings of the training (JSON); NULL for a base model.
    trained_at           TIMESTAMP,
    -- When it was trained (UTC); NULL for a base model.
    first_seen_at        TIMESTAMP NOT NULL,
    run_id               VARCHAR
    -- The Dagster run that trained it; of a base model, the one that wrote the row.
);
CREATE TABLE IF NOT EXISTS dim_metric (
    -- What a metric_id means. One row a metric; a changed metric is a new one.
    metric_id       VARCHAR PRIMARY KEY,
    -- Key of the metric.
    name            VARCHAR NOT NULL,
    -- What it is called, whatever its encoder.
    encoder         VARCHAR,
    -- Id of the model behind it; empty where none is asked.
    revision        VARCHAR,
    -- Commit or fingerprint of that model; empty where it has none.
    preprocessing   VARCHAR,
    -- What is done to an image first; of CLIP's, crop shows its middle and pad all of it.
    version         INTEGER,
    -- Version of how it is computed.
    description     VARCHAR,
    -- What it measures, with unit and range.
    first_seen_at   TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS fct_promotion (
    -- Decisions about which checkpoint is served; the report gate_decisions tells them with their
    -- numbers. One row a decision.
    decision_id     VARCHAR PRIMARY KEY,
    -- Key of the decision.
    decided_at      TIMESTAMP NOT NULL,
    -- When (UTC).
    checkpoint_id   VARCHAR NOT NULL,
    -- The checkpoint that was judged or pinned.
    champion_before VARCHAR,
    -- What was served until then.
    decision        VARCHAR NOT NULL CHECK (decision IN ('promote', 'hold', 'reject')),
    -- promote, hold or reject.
    reason          VARCHAR NOT NULL,
    -- What decided, in words.
    numbers         VARCHAR,
    -- What it was decided by (JSON).
    decided_by      VARCHAR,
    -- gate, or the name of the person.
    run_id          VARCHAR,
    -- The Dagster run of the decision; NULL where a person decided.
    base_model      VARCHAR
    -- The base model whose champion it is about; NULL where that is not known.
);
CREATE TABLE IF NOT EXISTS current_generation (
    -- The images that the pipeline draws now; reports are about them. One row an image.
    generation_key  VARCHAR NOT NULL
);
CREATE TABLE IF NOT EXISTS fct_drawing (
    -- Which run drew an image. One row a set of pixels.
    pixel_key       VARCHAR PRIMARY KEY,
    run_id          VARCHAR NOT NULL,
    -- The Dagster run that drew it.
    environment_id  VARCHAR,
    drawn_at        TIMESTAMP
    -- When it was drawn (UTC).
);
CREATE TABLE IF NOT EXISTS dim_environment (
    -- Versions of code and packages that runs worked with. One row a combination.
    environment_id  VARCHAR PRIMARY KEY,
    -- Key of the combination.
    posterpipe      VARCHAR,
    -- Version of posterpipe.
    source          VARCHAR,
    -- Hash of its source files.
    commit_id       VARCHAR,
    -- Commit of the checkout; empty outside of one.
    python          VARCHAR,
    -- Version of Python.
    platform        VARCHAR,
    -- Operating system and processor.
    packages        VARCHAR
    -- Versions by package (JSON).
);
CREATE TABLE IF NOT EXISTS run_environment (
    -- Which environments a run worked in. One row a run and environment.
    run_id          VARCHAR NOT NULL,
    -- The Dagster run.
    environment_id  VARCHAR NOT NULL,
    PRIMARY KEY (run_id, environment_id)
);
CREATE TABLE IF NOT EXISTS fct_nearest (
    -- The training poster that an image is nearest to. One row an image and encoder; the latest
    -- measurement.
    generation_key       VARCHAR NOT NULL,
    metric_id            VARCHAR NOT NULL,
    -- The metric of the similarity, as in dim_metric.
    nearest_poster       VARCHAR NOT NULL,
    -- sha256 of the nearest training image.
    similarity           DOUBLE NOT NULL,
    -- Cosine with it, -1 to 1.
    similarity_threshold DOUBLE,
    -- The cosine from which that counts as a copy; NULL where too few posters were compared to
    -- know.
    copy_sensitivity     DOUBLE,
    -- Share of training posters, cut and compressed a bit, that the threshold finds, 0 to 1; NULL
    -- without a threshold.
    hash_poster          VARCHAR NOT NULL,
    -- sha256 of the training image with the nearest perceptual hash.
    hash_distance        INTEGER,
    -- Bits of 64 in which its perceptual hash differs.
    hash_threshold       INTEGER,
    -- The distance up to which that counts as a copy.
    copied               BOOLEAN NOT NULL,
    -- Whether either of the two says that the image is a copy.
    measured_at          TIMESTAMP NOT NULL,
    -- When it was measured (UTC).
    run_id               VARCHAR,
    PRIMARY KEY (generation_key, metric_id)
);
CREATE TABLE IF NOT EXISTS fct_title (
    -- The title set in type on an image. One row an image that is lettered.
    generation_key  VARCHAR PRIMARY KEY,
    title           VARCHAR NOT NULL,
    -- The title.
    image           VARCHAR NOT NULL,
    -- sha256 of the titled PNG; empty where no title was set.
    image_path      VARCHAR NOT NULL,
    -- Path of that PNG inside the store; empty where no title was set.
    style           VARCHAR,
    -- Style of the lettering.
    cap_height      INTEGER,
    -- Height of its capitals, in pixels of the titled image.
    contrast        DOUBLE,
    -- Least contrast of letters and ground, 1 to 21 (WCAG).
    scrim           BOOLEAN,
    -- Whether the ground had to be made darker or lighter.
    covered         DOUBLE,
    -- Share of the main object below the title, 0 to 1.
    status          VARCHAR NOT NULL CHECK (status IN ('ok', 'blocked', 'failed')),
    -- ok, blocked (the image is black or of one colour) or failed (not set).
    reason          VARCHAR NOT NULL,
    -- Why it is not ok; of ok, which signs were left out, empty for none.
    set_at          TIMESTAMP NOT NULL,
    -- When it was set (UTC).
    run_id          VARCHAR
);
CREATE TABLE IF NOT EXISTS fct_reading (
    -- What the OCR read on an image. One row an image and lettering; the latest reading.
    generation_key  VARCHAR NOT NULL,
    lettering       VARCHAR NOT NULL CHECK (lettering IN ('drawn', 'set')),
    -- drawn (by the model) or set (in type, afterwards).
    title           VARCHAR NOT NULL,
    -- What it should have read.
    read            VARCHAR NOT NULL,
    -- What it read.
    distance        DOUBLE NOT NULL,
    -- Normalised edit distance of the two, 0 (equal) to 1.
    exact           BOOLEAN NOT NULL,
    -- Whether it read the title exactly.
    read_at         TIMESTAMP NOT NULL,
    -- When it was read (UTC).
    run_id          VARCHAR,
    PRIMARY KEY (generation_key, lettering)
);
CREATE TABLE IF NOT EXISTS current_metric (
    -- The metrics that the pipeline uses now. One row a scoring step and metric.
    step            VARCHAR NOT NULL,
    -- The asset that scores by it.
    metric_id       VARCHAR NOT NULL,
    place           INTEGER NOT NULL,
    -- Its place among the step's metrics, from 1.
    PRIMARY KEY (step, metric_id)
);
CREATE TABLE IF NOT EXISTS current_poster (
    -- The posters as they are now, with their captions. One row a file.
    poster_id         VARCHAR NOT NULL,
    -- sha256 of the file; empty where it cannot be read.
    source_name       VARCHAR NOT NULL,
    -- Path of the file inside the landing folder.
    status            VARCHAR NOT NULL,
    -- ok, rejected or duplicate.
    reason            VARCHAR NOT NULL,
    -- Why it is not ok; empty for ok.
    format            VARCHAR,
    -- Format of the file.
    width             INTEGER,
    -- Pixels of the poster as it was found.
    height            INTEGER,
    -- Pixels of the poster as it was found.
    size_bytes        BIGINT,
    -- Size of the file.
    near_duplicate_of VARCHAR,
    -- The first poster that looks almost the same; empty for none.
    image             VARCHAR,
    -- sha256 of the training image that was made of it; NULL without one.
    image_path        VARCHAR,
    -- Path of that image inside the store; NULL without one.
    caption           VARCHAR,
    -- Its caption; NULL without one.
    caption_source    VARCHAR,
    -- human or model.
    caption_status    VARCHAR,
    -- ok or failed; NULL where nobody was to caption it.
    caption_reason    VARCHAR,
    -- Why it failed, or what is to be known of the caption; else empty.
    in_training_set   BOOLEAN NOT NULL,
    -- Whether it is in the training set.
    recorded_at       TIMESTAMP NOT NULL,
    run_id            VARCHAR
);
"""
"""A comment stands below the table or column that it describes; columns without one have theirs in
`_OFTEN`. `publication` writes both into the database that analysts read."""


def _comments(statements: str) -> dict[str, dict[str, str]]:
    """The comments by table, with TABLE for its own, then by column."""
    comments: dict[str, dict[str, str]] = {}
    table, name = "", TABLE
    for first, *words in map(str.split, filter(None, statements.splitlines())):
        if first == "CREATE":
            table, name = words[-2], TABLE
            comments[table] = {}
        elif first == "--":
            before = comments[table].get(name, "")
            comments[table][name] = f"{before} {' '.join(words)}".lstrip()
        else:
            name = first
    return comments


TABLES = frozenset(_comments(_VERSIONS + _TABLES))
"""What the pipeline writes; whatever else lies there is a report."""

VIEWS = frozenset({"clip_scores"})

# greatest() passes over NULL, so a blocked image would score 0 without the CASE.
_VIEW = """
CREATE OR REPLACE VIEW clip_scores AS
WITH current_key AS (
    SELECT DISTINCT generation_key FROM current_generation
)
SELECT
    image.variant,
    image.prompt_id,
    prompt.prompt,
    image.seed,
    image.checkpoint_id,
    score.metric_id,
    score.value AS clip_cosine,
    CASE WHEN score.value IS NOT NULL THEN 2.5 * greatest(score.value, 0) END AS clip_score,
    image.image_path,
    score.scored_at,
    score.run_id,
    score.generation_key,
    current_key.generation_key IS NOT NULL AS is_current,
    score.status
FROM fct_score AS score
JOIN fct_image AS image ON image.generation_key = score.generation_key
JOIN dim_prompt AS prompt ON prompt.prompt_key = image.prompt_key
LEFT JOIN current_key ON current_key.generation_key = score.generation_key
WHERE score.metric_id LIKE 'clip\\_t.%' ESCAPE '\\'
"""

_VIEW_COMMENTS = {
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
}

COMMENTS = _comments(_VERSIONS + _TABLES) | {"clip_scores": _VIEW_COMMENTS}
"""By table, then by column; columns that are not named here have their text in `_OFTEN`."""

_MIGRATION = """
ALTER TABLE fct_nearest ADD COLUMN IF NOT EXISTS copy_sensitivity DOUBLE;
ALTER TABLE fct_promotion ADD COLUMN IF NOT EXISTS base_model VARCHAR;
UPDATE fct_promotion SET base_model = known.base_model
FROM (
    SELECT checkpoint_id, CASE kind WHEN 'base' THEN checkpoint_id ELSE base_model END AS base_model
    FROM dim_checkpoint
) AS known
WHERE fct_promotion.checkpoint_id = known.checkpoint_id AND fct_promotion.base_model IS NULL;
"""
"""What tables of an older schema lack, filled in as far as it is known."""


def schema_version(connection: duckdb.DuckDBPyConnection) -> int | None:
    """Version of the schema of a database; None for an empty one."""
    connection.execute(_VERSIONS)
    ((version,),) = connection.execute("SELECT max(version) FROM schema_version").fetchall()
    return version


def create_schema(connection: duckdb.DuckDBPyConnection) -> None:
    """Brings a database that is empty or of an older schema to this one."""
    connection.execute(_TABLES)
    connection.execute(_MIGRATION)
    connection.execute(_VIEW)
    connection.execute("INSERT INTO schema_version VALUES (?)", [SCHEMA_VERSION])


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
