-- Counts of what went in and what came out, with what did not and why: one row a state.
with posters as (
    select * from {{ source('warehouse', 'current_poster') }}
),

images as (
    select * from {{ ref('stg_current_images') }}
),

scores as (
    select
        score.status,
        metrics.metric
    from {{ ref('stg_current_scores') }} as score
    inner join {{ ref('stg_metrics') }} as metrics on metrics.metric_id = score.metric_id
),

poster_states as (
    select
        1 as section_place,
        'posters' as section,
        status as item,
        count(*) as items,
        status = 'rejected' as is_problem,
        'files of the landing folder: ok are used, others have a reason' as explanation
    from posters
    group by status
),

near_duplicates as (
    select
        2 as section_place,
        'resembling posters' as section,
        case when near_duplicate_of <> '' then 'resembles another' else 'unlike all others' end
            as item,
        count(*) as items,
        coalesce(near_duplicate_of, '') <> '' as is_problem,
        'usable posters by perceptual hash; resembling ones are used all the same' as explanation
    from posters
    where status = 'ok'
    group by all
),

captions as (
    select
        3 as section_place,
        'captions' as section,
        case
            when caption_status is null then 'none'
            when caption_status <> 'ok' then 'failed'
            when caption_reason <> '' then caption_source || ', to look at'
            else caption_source
        end as item,
        count(*) as items,
        coalesce(caption_status, '') <> 'ok' or coalesce(caption_reason, '') <> '' as is_problem,
        'usable posters by who described them: a model (BLIP) or a human' as explanation
    from posters
    where status = 'ok'
    group by all
),

training_set as (
    select
        4 as section_place,
        'training set' as section,
        case when in_training_set then 'trained on' else 'left out' end as item,
        count(*) as items,
        not in_training_set as is_problem,
        'usable posters in training.csv' as explanation
    from posters
    where status = 'ok'
    group by in_training_set
),

generations as (
    select
        5 as section_place,
        'images of ' || variant as section,
        status as item,
        count(*) as items,
        status <> 'ok' as is_problem,
        'images of the prompt suite: blocked are black or of one colour, failed were not drawn'
            as explanation
    from images
    group by variant, status
),

judgements as (
    select
        6 as section_place,
        'scores of ' || metric as section,
        status as item,
        count(*) as items,
        status = 'failed' as is_problem,
        'images judged by the metric; blocked are black ones, or have titles beyond the OCR'
            as explanation
    from scores
    group by metric, status
),

sections as (
    select * from poster_states
    union all
    select * from near_duplicates
    union all
    select * from captions
    union all
    select * from training_set
    union all
    select * from generations
    union all
    select * from judgements
)

select
    section,
    item,
    items,
    cast(sum(items) over (partition by section) as bigint) as total,
    round(items / sum(items) over (partition by section), 6) as share,
    is_problem,
    explanation
from sections
order by
    section_place,
    section,
    is_problem,
    item
