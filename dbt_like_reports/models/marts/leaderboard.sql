-- Seeds of one prompt are not independent answers: they are averaged, and n is the prompts. All
-- variants of a prompt and seed stand side by side, so that the scores are read once.
{% set variants = var('variants') %}
with scores as (
    select * from {{ ref('stg_current_scores') }}
),

cells as (
    select
        metric_id,
        prompt_id,
        seed,
        {%- for variant in variants %}
        max(value) filter (where variant = '{{ variant }}') as {{ variant }}{{ ',' if not loop.last }}
        {%- endfor %}
    from scores
    group by metric_id, prompt_id, seed
),

-- Same prompt, same seed, same noise: what differs is the variant. A pair without one of its
-- scores is left out.
prompts as (
    select
        metric_id,
        prompt_id,
        {%- for variant in variants %}
        avg({{ variant }}) as {{ variant }}_mean,
        avg({{ variant }} - sd) as {{ variant }}_difference,
        count({{ variant }} - sd) as {{ variant }}_pairs{{ ',' if not loop.last }}
        {%- endfor %}
    from cells
    group by metric_id, prompt_id
),

estimates as (
    {%- for variant in variants %}
    select
        metric_id,
        '{{ variant }}' as variant,
        count({{ variant }}_mean) as prompts,
        avg({{ variant }}_mean) as mean,
        stddev_samp({{ variant }}_mean) as deviation,
        {%- if variant == 'sd' %}
        0 as pairs,
        0 as paired_prompts,
        cast(null as double) as difference,
        cast(null as double) as difference_deviation
        {%- else %}
        sum({{ variant }}_pairs) as pairs,
        count({{ variant }}_difference) as paired_prompts,
        avg({{ variant }}_difference) as difference,
        stddev_samp({{ variant }}_difference) as difference_deviation
        {%- endif %}
    from prompts
    group by metric_id
    {{ 'union all' if not loop.last }}
    {%- endfor %}
),

counts as (
    select
        metric_id,
        variant,
        min(checkpoint_id) as checkpoint_id,
        count(*) as images,
        count(*) filter (where status = 'blocked') as blocked,
        count(*) filter (where status = 'failed') as failed
    from scores
    group by metric_id, variant
),

metrics as (
    select * from {{ ref('stg_metrics') }}
)

select
    counts.metric_id,
    metrics.metric,
    metrics.better,
    metrics.is_headline,
    counts.variant,
    counts.checkpoint_id,
    found.prompts,
    counts.images,
    counts.blocked,
    counts.failed,
    round(found.mean, 6) as mean,
    {{ t_interval('found.mean', 'found.deviation', 'found.prompts', '-') }} as low_95,
    {{ t_interval('found.mean', 'found.deviation', 'found.prompts', '+') }} as high_95,
    cast(found.pairs as bigint) as pairs,
    round(found.difference, 6) as diff_to_sd,
    {{ t_interval('found.difference', 'found.difference_deviation', 'found.paired_prompts', '-') }}
        as diff_low_95,
    {{ t_interval('found.difference', 'found.difference_deviation', 'found.paired_prompts', '+') }}
        as diff_high_95
from counts
inner join estimates as found
    on found.metric_id = counts.metric_id and found.variant = counts.variant
inner join metrics on metrics.metric_id = counts.metric_id
order by
    metrics.is_headline desc,
    metrics.place,
    counts.metric_id,
    list_position({{ variants }}, counts.variant)
