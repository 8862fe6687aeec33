with metrics as (
    select metric_id
    from {{ ref('stg_metrics') }}
    where is_current
),

lettered as (
    select generation_key
    from {{ source('warehouse', 'fct_title') }}
)

select
    score.metric_id,
    score.generation_key,
    image.variant,
    image.checkpoint_id,
    image.prompt_id,
    image.seed,
    image.negative_prompt,
    image.question,
    image.negative_key,
    score.value,
    score.status,
    image.status as image_status
from {{ source('warehouse', 'fct_score') }} as score
inner join {{ ref('stg_current_images') }} as image
    on image.generation_key = score.generation_key
where
    score.metric_id in (select metric_id from metrics)
    and {{ is_asked('score.metric_id', 'score.generation_key in (select generation_key from lettered)') }}
