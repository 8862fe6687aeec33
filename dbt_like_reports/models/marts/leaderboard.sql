-- Seeds of one prompt are not independent answers: they are averaged, and n is the prompts.
with scores as (
    select * from {{ ref('stg_current_clip_scores') }}
),

counts as (
    select
        metric_id,
        variant,
        min(checkpoint_id) as checkpoint_id,
        count(*) as images,
        count(*) - count(clip_cosine) as blocked
    from scores
    group by metric_id, variant
),

prompt_means as (
    select
        metric_id,
        variant,
        prompt_id,
        avg(clip_cosine) as cosine
    from scores
    group by metric_id, variant, prompt_id
),

variant_means as (
    select
        metric_id,
        variant,
        count(cosine) as prompts,
        avg(cosine) as mean,
        stddev_samp(cosine) as deviation
    from prompt_means
    group by metric_id, variant
),

-- Same prompt, same seed, same noise: what differs is the variant. A pair without one of its
-- scores is left out.
prompt_differences as (
    select
        other.metric_id,
        other.variant,
        other.prompt_id,
        avg(other.clip_cosine - base.clip_cosine) as difference
    from scores as other
    inner join scores as base
        on
            base.metric_id = other.metric_id
            and base.prompt_id = other.prompt_id
            and base.seed = other.seed
    where base.variant = 'sd' and other.variant <> 'sd'
    group by other.metric_id, other.variant, other.prompt_id
),

variant_differences as (
    select
        metric_id,
        variant,
        count(difference) as prompts,
        avg(difference) as mean,
        stddev_samp(difference) as deviation
    from prompt_differences
    group by metric_id, variant
)

select
    counts.metric_id,
    counts.variant,
    counts.checkpoint_id,
    counts.images,
    counts.blocked,
    means.prompts,
    round(means.mean, 6) as mean_clip_cosine,
    {{ t_interval('means.mean', 'means.deviation', 'means.prompts', '-') }} as low_95,
    {{ t_interval('means.mean', 'means.deviation', 'means.prompts', '+') }} as high_95,
    round(paired.mean, 6) as diff_to_sd,
    {{ t_interval('paired.mean', 'paired.deviation', 'paired.prompts', '-') }} as diff_low_95,
    {{ t_interval('paired.mean', 'paired.deviation', 'paired.prompts', '+') }} as diff_high_95
from counts
inner join variant_means as means
    on means.metric_id = counts.metric_id and means.variant = counts.variant
left join variant_differences as paired
    on paired.metric_id = counts.metric_id and paired.variant = counts.variant
order by
    counts.metric_id,
    list_position(['sd', 'sd_negative', 'dreambooth', 'dreambooth_negative'], counts.variant)
