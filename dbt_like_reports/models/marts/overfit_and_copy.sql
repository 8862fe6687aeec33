-- Every checkpoint is held against the posters that it was trained on, the base model against those
-- of the checkpoint that it was last compared with: ids of these metrics name the training set. One
-- row is of one suite and one setting of the sampler, those of today: the share of copies depends on
-- both. Where there are several sets of posters that a checkpoint was held against, the one in use
-- now counts, else the one that was scored last.
--
-- The base model saw neither set of posters: its gap is how the two sets differ, and the zero of the
-- gap. `gap_diff_to_sd` is the gap less that, image by image as in `leaderboard`.
{% set measures = {
    'holdout': 'similarity.holdout.',
    'training': 'similarity.training.',
    'gap': 'overfit_gap.',
    'nearest': 'nearest.training.',
} %}
with images as (
    select * from {{ ref('stg_comparable_images') }}
),

measures as (
    select
        metric_id,
        encoder,
        preprocessing,
        is_current as is_used,
        case
            {%- for name, prefix in measures.items() %}
            when metric_id like '{{ prefix }}%' then '{{ name }}'
            {%- endfor %}
        end as measure
    from {{ ref('stg_metrics') }}
),

prompt_means as (
    select
        images.checkpoint_id,
        images.variant,
        images.prompt_id,
        measures.encoder,
        measures.preprocessing,
        measures.measure,
        score.metric_id,
        measures.is_used,
        count(*) as images,
        count(score.value) as compared,
        avg(score.value) as mean,
        max(score.value) as highest,
        max(score.scored_at) as scored_at,
        bool_or(images.is_current) as is_current
    from {{ source('warehouse', 'fct_score') }} as score
    inner join measures on measures.metric_id = score.metric_id
    inner join images on images.generation_key = score.generation_key
    where measures.measure is not null
    group by
        images.checkpoint_id,
        images.variant,
        images.prompt_id,
        measures.encoder,
        measures.preprocessing,
        measures.measure,
        score.metric_id,
        measures.is_used
),

all_estimates as (
    select
        checkpoint_id,
        variant,
        encoder,
        preprocessing,
        measure,
        metric_id,
        is_used,
        cast(sum(images) as bigint) as images,
        cast(sum(compared) as bigint) as compared,
        avg(mean) as mean,
        list(mean order by prompt_id) as means,
        max(highest) as highest,
        max(scored_at) as scored_at,
        bool_or(is_current) as is_current
    from prompt_means
    group by checkpoint_id, variant, encoder, preprocessing, measure, metric_id, is_used
),

estimates as (
    select *
    from all_estimates
    qualify row_number() over (
        partition by checkpoint_id, variant, encoder, preprocessing, measure
        -- After a change there and back, what was scored first is in use again.
        order by is_used desc, scored_at desc, metric_id
    ) = 1
),

side_by_side as (
    select
        checkpoint_id,
        variant,
        encoder,
        preprocessing,
        max(images) as images,
        max(compared) as compared,
        bool_or(is_current) as is_current,
        max(metric_id) filter (where measure = 'nearest') as nearest_metric_id,
        max(metric_id) filter (where measure = 'gap') as gap_metric_id,
        {%- for name in measures %}
        max(mean) filter (where measure = '{{ name }}') as {{ name }},
        {%- endfor %}
        max(highest) filter (where measure = 'nearest') as nearest_highest,
        bootstrap_interval(any_value(means) filter (where measure = 'gap')) as gap_ends
    from estimates
    group by checkpoint_id, variant, encoder, preprocessing
),

gaps as (
    select
        images.checkpoint_id,
        images.variant,
        images.prompt_id,
        images.seed,
        images.negative_prompt,
        images.question,
        images.is_current,
        score.metric_id,
        score.value
    from {{ source('warehouse', 'fct_score') }} as score
    inner join measures on measures.metric_id = score.metric_id
    inner join images on images.generation_key = score.generation_key
    where measures.measure = 'gap' and score.value is not null
),

gap_differences as (
    select
        gaps.checkpoint_id,
        gaps.variant,
        gaps.metric_id,
        gaps.prompt_id,
        avg(gaps.value - base.value) as difference
    from gaps
    inner join gaps as base
        on
            base.variant = 'sd'
            and base.is_current
            and base.metric_id = gaps.metric_id
            and base.prompt_id = gaps.prompt_id
            and base.seed = gaps.seed
            and base.question = gaps.question
    where
        gaps.variant <> 'sd'
        and (gaps.variant not like '%negative%' or gaps.negative_prompt <> '')
    group by gaps.checkpoint_id, gaps.variant, gaps.metric_id, gaps.prompt_id
),

beside_sd as (
    select
        checkpoint_id,
        variant,
        metric_id,
        avg(difference) as difference,
        bootstrap_interval(list(difference order by prompt_id)) as ends
    from gap_differences
    group by checkpoint_id, variant, metric_id
),

copies as (
    select
        images.checkpoint_id,
        images.variant,
        nearest.metric_id,
        count(*) filter (where nearest.copied) as copies,
        max(nearest.similarity_threshold) as copy_threshold,
        max(nearest.copy_sensitivity) as copy_sensitivity,
        min(nearest.hash_distance) as least_hash_distance
    from {{ source('warehouse', 'fct_nearest') }} as nearest
    inner join images on images.generation_key = nearest.generation_key
    group by images.checkpoint_id, images.variant, nearest.metric_id
),

checkpoints as (
    select * from {{ source('warehouse', 'dim_checkpoint') }}
)

select
    found.checkpoint_id,
    checkpoints.kind,
    checkpoints.trained_at,
    found.variant,
    coalesce(found.encoder, '') as encoder,
    coalesce(found.preprocessing, '') as preprocessing,
    coalesce(found.is_current, false) as is_current,
    found.images,
    found.compared,
    round(found.holdout, 6) as holdout_similarity,
    round(found.training, 6) as training_similarity,
    round(found.gap, 6) as overfit_gap,
    {{ within_range('found.gap_ends.low', "'overfit_gap.'") }} as gap_low_95,
    {{ within_range('found.gap_ends.high', "'overfit_gap.'") }} as gap_high_95,
    round(beside_sd.difference, 6) as gap_diff_to_sd,
    {{ difference_within_range('beside_sd.ends.low', "'overfit_gap.'", "'difference'") }}
        as gap_diff_low_95,
    {{ difference_within_range('beside_sd.ends.high', "'overfit_gap.'", "'difference'") }}
        as gap_diff_high_95,
    round(found.nearest, 6) as nearest_mean,
    round(found.nearest_highest, 6) as nearest_highest,
    round(copies.copy_threshold, 6) as copy_threshold,
    round(copies.copy_sensitivity, 6) as copy_sensitivity,
    copies.copies,
    round(copies.copies / nullif(found.compared, 0), 6) as copy_share,
    copies.least_hash_distance
from side_by_side as found
inner join checkpoints on checkpoints.checkpoint_id = found.checkpoint_id
left join beside_sd
    on
        beside_sd.checkpoint_id = found.checkpoint_id
        and beside_sd.variant = found.variant
        and beside_sd.metric_id = found.gap_metric_id
left join copies
    on
        copies.checkpoint_id = found.checkpoint_id
        and copies.variant = found.variant
        and copies.metric_id = found.nearest_metric_id
order by
    found.is_current desc,
    coalesce(checkpoints.trained_at, checkpoints.first_seen_at) desc,
    found.checkpoint_id,
    list_position({{ var('variants') }}, found.variant),
    found.encoder,
    found.preprocessing
