-- Titles as the model drew them beside the same titles set in type, read by the same OCR.
with scores as (
    select
        score.metric_id,
        score.variant,
        score.checkpoint_id,
        score.prompt_id,
        score.seed,
        score.value,
        -- The image is good, and there is nothing to measure: it is the title's letters.
        score.status = 'blocked' and score.image_status = 'ok' as is_unknown,
        split_part(score.metric_id, '.', 1) as measure,
        split_part(score.metric_id, '.', 2) as lettering
    from {{ ref('stg_current_scores') }} as score
    where score.metric_id like 'title\_distance.%' escape '\'
        or score.metric_id like 'title\_exact.%' escape '\'
),

readers as (
    select
        metric_id,
        revision
    from {{ source('warehouse', 'dim_metric') }}
),

unknown_titles as (
    select distinct prompt_id
    from scores
    where is_unknown
),

prompt_means as (
    select
        scores.lettering,
        scores.variant,
        scores.prompt_id,
        min(scores.checkpoint_id) as checkpoint_id,
        min(readers.revision) as reader,
        -- Of such a title no image counts, a black one neither.
        scores.prompt_id in (select prompt_id from unknown_titles) as is_unknown,
        count(*) filter (where measure = 'title_exact') as images,
        count(value) filter (where measure = 'title_exact') as readable,
        sum(value) filter (where measure = 'title_exact') as exact,
        -- An image that could not be read counts, as one without its title.
        avg(coalesce(value, 0)) filter (where measure = 'title_exact') as exact_share,
        avg(value) filter (where measure = 'title_distance') as distance
    from scores
    inner join readers on readers.metric_id = scores.metric_id
    group by scores.lettering, scores.variant, scores.prompt_id
),

asked as (
    select
        lettering,
        variant,
        min(checkpoint_id) as checkpoint_id,
        min(reader) as reader,
        count(*) filter (where is_unknown) as unknown_titles
    from prompt_means
    group by lettering, variant
),

estimates as (
    select
        lettering,
        variant,
        count(exact_share) as prompts,
        cast(sum(images) as bigint) as images,
        cast(sum(readable) as bigint) as readable,
        cast(sum(exact) as bigint) as exact,
        avg(exact_share) as exact_share,
        avg(distance) as distance,
        bootstrap_interval(list(distance order by prompt_id)) as distance_ends
    from prompt_means
    where not is_unknown
    group by lettering, variant
)

select
    asked.lettering,
    asked.variant,
    asked.checkpoint_id,
    asked.reader,
    coalesce(prompts, 0) as prompts,
    coalesce(images, 0) as images,
    coalesce(readable, 0) as readable,
    coalesce(exact, 0) as exact,
    asked.unknown_titles,
    round(exact_share, 6) as exact_share,
    -- A prompt counts as one reading, however many seeds it has: they are alike. Where its seeds
    -- disagree, that is wider than it has to be.
    case when prompts > 1 then {{ wilson_interval('(exact_share * prompts)', 'prompts', '-') }} end
        as exact_low_95,
    case when prompts > 1 then {{ wilson_interval('(exact_share * prompts)', 'prompts', '+') }} end
        as exact_high_95,
    round(distance, 6) as mean_distance,
    {{ within_range('distance_ends.low', "'title_distance.'") }} as distance_low_95,
    {{ within_range('distance_ends.high', "'title_distance.'") }} as distance_high_95
from asked
left join estimates
    on estimates.lettering = asked.lettering and estimates.variant = asked.variant
order by
    asked.lettering,
    list_position({{ var('variants') }}, asked.variant)
