-- Checkpoints are compared on the cells (variant, prompt in its wording, seed, negative prompt,
-- sampler) of the current images that the metric was asked about: titles, say, are read on the
-- images of some seeds only.
with asked as (
    select distinct
        metric_id,
        prompt_id,
        seed
    from {{ ref('stg_current_scores') }}
),

expected as (
    select
        asked.metric_id,
        image.variant,
        count(*) as images
    from {{ ref('stg_current_images') }} as image
    inner join asked on asked.prompt_id = image.prompt_id and asked.seed = image.seed
    group by asked.metric_id, image.variant
),

drawn as (
    select * from {{ ref('stg_comparable_images') }}
),

metrics as (
    select * from {{ ref('stg_metrics') }}
    where is_current
),

prompt_means as (
    select
        drawn.checkpoint_id,
        drawn.variant,
        score.metric_id,
        drawn.prompt_id,
        -- A blocked image is an answer, one that was not drawn or not judged is not.
        count(*) filter (where score.status <> 'failed') as images,
        {{ as_averaged('avg(score.value)', 'any_value(metrics.scale)') }} as mean,
        bool_or(drawn.is_current) as is_current
    from {{ source('warehouse', 'fct_score') }} as score
    inner join drawn on drawn.generation_key = score.generation_key
    inner join metrics on metrics.metric_id = score.metric_id
    inner join asked
        on
            asked.metric_id = score.metric_id
            and asked.prompt_id = drawn.prompt_id
            and asked.seed = drawn.seed
    group by drawn.checkpoint_id, drawn.variant, score.metric_id, drawn.prompt_id
),

estimates as (
    select
        checkpoint_id,
        variant,
        metric_id,
        count(mean) as prompts,
        cast(sum(images) as bigint) as images,
        avg(mean) as mean,
        bootstrap_interval(list(mean order by prompt_id)) as ends,
        bool_or(is_current) as is_current
    from prompt_means
    group by checkpoint_id, variant, metric_id
),

decisions as (
    select * from {{ ref('stg_decisions') }}
),

verdicts as (
    select
        checkpoint_id,
        arg_max(decision, place) as decision,
        max(decided_at) as decided_at,
        bool_or(decision = 'promote') as was_promoted
    from decisions
    where not by_person
    group by checkpoint_id
),

champion as (
    select arg_max(champion_after, place) as checkpoint_id
    from decisions
    where is_of_current_base
),

checkpoints as (
    select * from {{ source('warehouse', 'dim_checkpoint') }}
)

select
    estimates.checkpoint_id,
    checkpoints.kind,
    checkpoints.trained_at,
    checkpoints.first_seen_at,
    estimates.variant,
    estimates.metric_id,
    metrics.metric,
    metrics.better,
    metrics.scale,
    metrics.is_headline,
    estimates.prompts,
    estimates.images,
    expected.images as expected_images,
    estimates.images = expected.images as is_complete,
    round({{ as_mean('estimates.mean', 'metrics.scale') }}, 6) as mean,
    {{ within_range(as_mean('estimates.ends.low', 'metrics.scale'), 'estimates.metric_id') }}
        as low_95,
    {{ within_range(as_mean('estimates.ends.high', 'metrics.scale'), 'estimates.metric_id') }}
        as high_95,
    verdicts.decision,
    verdicts.decided_at,
    coalesce(verdicts.was_promoted, false) as was_promoted,
    case
        when champion.checkpoint_id is null then checkpoints.kind = 'base' and estimates.is_current
        else estimates.checkpoint_id = champion.checkpoint_id
    end as is_champion,
    estimates.is_current
from estimates
inner join checkpoints on checkpoints.checkpoint_id = estimates.checkpoint_id
inner join metrics on metrics.metric_id = estimates.metric_id
inner join expected
    on
        expected.metric_id = estimates.metric_id
        and expected.variant = estimates.variant
left join verdicts on verdicts.checkpoint_id = estimates.checkpoint_id
cross join champion
order by
    metrics.is_headline desc,
    metrics.place,
    estimates.metric_id,
    coalesce(checkpoints.trained_at, checkpoints.first_seen_at),
    estimates.checkpoint_id,
    list_position({{ var('variants') }}, estimates.variant)
