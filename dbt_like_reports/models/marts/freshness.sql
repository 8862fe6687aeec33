-- When something last happened at each stage. Ages are left to the reader: those of the build
-- would be right only at its moment. What a person did has no run, and arg_max would name another.
with posters as (
    select
        1 as place,
        'posters' as subject,
        max(recorded_at) as latest_at,
        arg_max(run_id, recorded_at) as run_id,
        count(*) as items,
        'the listing of the landing folder changed' as explanation
    from {{ source('warehouse', 'current_poster') }}
),

checkpoints as (
    select
        2 as place,
        'checkpoint' as subject,
        max(trained_at) as latest_at,
        arg_max(run_id, trained_at) as run_id,
        count(*) as items,
        'a checkpoint was trained' as explanation
    from {{ source('warehouse', 'dim_checkpoint') }}
    where kind = 'tuned'
),

images as (
    select
        3 as place,
        'images' as subject,
        max(drawn_at) as latest_at,
        arg_max(run_id, drawn_at) as run_id,
        count(*) as items,
        'an image was drawn' as explanation
    from {{ source('warehouse', 'fct_drawing') }}
),

scores as (
    select
        4 as place,
        'scores' as subject,
        max(scored_at) as latest_at,
        arg_max(run_id, scored_at) as run_id,
        count(*) as items,
        'an image was judged by a metric' as explanation
    from {{ source('warehouse', 'fct_score') }}
),

titles as (
    select
        5 as place,
        'titles' as subject,
        max(set_at) as latest_at,
        arg_max(run_id, set_at) as run_id,
        count(*) as items,
        'a title was set in type' as explanation
    from {{ source('warehouse', 'fct_title') }}
),

decisions as (
    select
        6 as place,
        'gate' as subject,
        max(decided_at) as latest_at,
        arg_max_null(run_id, decided_at) as run_id,
        count(*) as items,
        'a checkpoint was judged, or pinned by a person' as explanation
    from {{ source('warehouse', 'fct_promotion') }}
),

stages as (
    select * from posters
    union all
    select * from checkpoints
    union all
    select * from images
    union all
    select * from scores
    union all
    select * from titles
    union all
    select * from decisions
)

select
    subject,
    latest_at,
    run_id,
    items,
    explanation
from stages
order by place
