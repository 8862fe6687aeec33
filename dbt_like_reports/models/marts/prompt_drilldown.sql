-- One row an image of the suite. The named scores are those of the first metric of their kind; all
-- of them, by name, are in the maps `scores` and `differences_to_sd`.
with images as (
    select * from {{ ref('stg_current_images') }}
),

metrics as (
    select * from {{ ref('stg_metrics') }}
    where is_current
),

scores as (
    select
        score.generation_key,
        score.metric_id,
        score.prompt_id,
        score.seed,
        score.variant,
        score.question,
        score.value,
        metrics.metric,
        metrics.is_headline,
        metrics.place
    from {{ ref('stg_current_scores') }} as score
    inner join metrics on metrics.metric_id = score.metric_id
),

compared as (
    select
        scores.generation_key,
        scores.metric_id,
        scores.metric,
        scores.is_headline,
        scores.place,
        scores.value,
        case when scores.variant <> 'sd' then scores.value - base.value end as difference
    from scores
    left join scores as base
        on
            base.variant = 'sd'
            and base.metric_id = scores.metric_id
            and base.prompt_id = scores.prompt_id
            and base.seed = scores.seed
            and base.question = scores.question
),

side_by_side as (
    select
        generation_key,
        max(value) filter (where is_headline) as clip_cosine,
        max(difference) filter (where is_headline) as clip_diff_to_sd,
        {%- for name, prefix in [
            ('clip_specific', 'clip_specific.'),
            ('holdout_similarity', 'similarity.holdout.'),
            ('training_similarity', 'similarity.training.'),
            ('overfit_gap', 'overfit_gap.'),
            ('diversity', 'diversity.'),
        ] %}
        arg_min(value, place) filter (where metric_id like '{{ prefix }}%') as {{ name }},
        {%- endfor %}
        map_from_entries(
            list((metric, round(value, 6)) order by is_headline desc, place, metric)
            filter (where value is not null)
        ) as scores,
        map_from_entries(
            list((metric, round(difference, 6)) order by is_headline desc, place, metric)
            filter (where difference is not null)
        ) as differences_to_sd
    from compared
    group by generation_key
),

prompts as (
    select * from {{ source('warehouse', 'dim_prompt') }}
),

titles as (
    select * from {{ source('warehouse', 'fct_title') }}
),

readings as (
    select
        generation_key,
        max(read) filter (where lettering = 'drawn') as read_drawn,
        max(distance) filter (where lettering = 'drawn') as distance_drawn,
        max(read) filter (where lettering = 'set') as read_set,
        max(distance) filter (where lettering = 'set') as distance_set
    from {{ source('warehouse', 'fct_reading') }}
    group by generation_key
),

nearest as (
    select * from {{ ref('stg_current_nearest') }}
)

select
    images.prompt_id,
    images.seed,
    images.variant,
    prompts.prompt,
    prompts.score_text,
    prompts.title,
    images.negative_prompt,
    images.checkpoint_id,
    images.generation_key,
    images.status,
    images.reason,
    nullif(images.image_path, '') as image_path,
    nullif(titles.image_path, '') as titled_image_path,
    images.width,
    images.height,
    round(side_by_side.clip_cosine, 6) as clip_cosine,
    -- greatest() passes over NULL: without the case an image without a score would have 0.
    case
        when side_by_side.clip_cosine is not null
            then round(2.5 * greatest(side_by_side.clip_cosine, 0), 6)
    end as clip_score,
    round(side_by_side.clip_diff_to_sd, 6) as clip_diff_to_sd,
    round(side_by_side.clip_specific, 6) as clip_specific,
    round(side_by_side.holdout_similarity, 6) as holdout_similarity,
    round(side_by_side.training_similarity, 6) as training_similarity,
    round(side_by_side.overfit_gap, 6) as overfit_gap,
    round(side_by_side.diversity, 6) as diversity,
    round(nearest.similarity, 6) as nearest_similarity,
    round(nearest.similarity_threshold, 6) as copy_threshold,
    nearest.nearest_poster,
    nearest.nearest_poster_name,
    nearest.nearest_poster_path,
    nearest.hash_distance,
    nearest.hash_poster,
    nearest.hash_poster_name,
    nearest.hash_poster_path,
    nearest.copied,
    readings.read_drawn,
    round(readings.distance_drawn, 6) as title_distance_drawn,
    readings.read_set,
    round(readings.distance_set, 6) as title_distance_set,
    side_by_side.scores,
    side_by_side.differences_to_sd
from images
inner join prompts on prompts.prompt_key = images.prompt_key
left join side_by_side on side_by_side.generation_key = images.generation_key
left join titles on titles.generation_key = images.generation_key
left join readings on readings.generation_key = images.generation_key
left join nearest on nearest.generation_key = images.generation_key
order by
    images.prompt_id,
    images.seed,
    list_position({{ var('variants') }}, images.variant)
