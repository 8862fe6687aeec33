-- The warehouse as posterpipe of schema 1 made it.
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (1);
CREATE TABLE IF NOT EXISTS fct_image (
    generation_key  VARCHAR PRIMARY KEY,
    pixel_key       VARCHAR NOT NULL,
    variant         VARCHAR NOT NULL,
    prompt_key      VARCHAR NOT NULL,
    prompt_id       VARCHAR NOT NULL,
    negative_prompt VARCHAR NOT NULL,
    seed            BIGINT NOT NULL,
    checkpoint_id   VARCHAR NOT NULL,
    image           VARCHAR NOT NULL,
    image_path      VARCHAR NOT NULL,
    status          VARCHAR NOT NULL CHECK (status IN ('ok', 'blocked', 'failed')),
    reason          VARCHAR NOT NULL,
    width           INTEGER,
    height          INTEGER,
    settings        VARCHAR,
    run_id          VARCHAR,
    recorded_at     TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS fct_score (
    generation_key  VARCHAR NOT NULL,
    metric_id       VARCHAR NOT NULL,
    value           DOUBLE,
    status          VARCHAR NOT NULL CHECK (status IN ('ok', 'blocked', 'failed')),
    reason          VARCHAR NOT NULL,
    scored_at       TIMESTAMP NOT NULL,
    run_id          VARCHAR,
    PRIMARY KEY (generation_key, metric_id),
    CHECK ((status = 'ok') = (value IS NOT NULL))
);
CREATE TABLE IF NOT EXISTS dim_prompt (
    prompt_key      VARCHAR PRIMARY KEY,
    prompt_id       VARCHAR NOT NULL,
    prompt          VARCHAR NOT NULL,
    score_text      VARCHAR NOT NULL,
    title           VARCHAR NOT NULL,
    first_seen_at   TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS dim_checkpoint (
    checkpoint_id        VARCHAR PRIMARY KEY,
    kind                 VARCHAR NOT NULL CHECK (kind IN ('base', 'tuned')),
    base_model           VARCHAR,
    training_set_version VARCHAR,
    settings             VARCHAR,
    trained_at           TIMESTAMP,
    first_seen_at        TIMESTAMP NOT NULL,
    run_id               VARCHAR
);
CREATE TABLE IF NOT EXISTS dim_metric (
    metric_id       VARCHAR PRIMARY KEY,
    name            VARCHAR NOT NULL,
    encoder         VARCHAR,
    revision        VARCHAR,
    preprocessing   VARCHAR,
    version         INTEGER,
    description     VARCHAR,
    first_seen_at   TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS fct_promotion (
    decision_id     VARCHAR PRIMARY KEY,
    decided_at      TIMESTAMP NOT NULL,
    checkpoint_id   VARCHAR NOT NULL,
    champion_before VARCHAR,
    decision        VARCHAR NOT NULL CHECK (decision IN ('promote', 'hold', 'reject')),
    reason          VARCHAR NOT NULL,
    numbers         VARCHAR,
    decided_by      VARCHAR,
    run_id          VARCHAR
);
CREATE TABLE IF NOT EXISTS current_generation (
    generation_key  VARCHAR NOT NULL
);
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
WHERE score.metric_id LIKE 'clip\_t.%' ESCAPE '\';
