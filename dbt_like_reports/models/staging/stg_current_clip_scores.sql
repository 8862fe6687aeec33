with scores as (
    select
        metric_id,
        variant,
        checkpoint_id,
        prompt_id,
        seed,
        clip_cosine
    from {{ source('warehouse', 'clip_scores') }}
    where is_current
),

current_images as (
    select count(distinct generation_key) as images
    from {{ source('warehouse', 'current_generation') }}
),

complete_metrics as (
    select metric_id
    from scores
    group by metric_id
    having count(*) = (select images from current_images)
)

select scores.*
from scores
inner join complete_metrics using (metric_id)
