with current_metrics as (
    select distinct metric_id
    from {{ source('warehouse', 'current_metric') }}
)

select
    score.metric_id,
    score.generation_key,
    image.variant,
    image.checkpoint_id,
    image.prompt_id,
    image.seed,
    score.value,
    score.status
from {{ source('warehouse', 'fct_score') }} as score
inner join {{ ref('stg_current_images') }} as image
    on image.generation_key = score.generation_key
inner join current_metrics on current_metrics.metric_id = score.metric_id
