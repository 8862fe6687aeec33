-- With several encoders, the first one counts: it is the one that the gate reads.
with current_metrics as (
    select
        metric_id,
        min(place) as place
    from {{ source('warehouse', 'current_metric') }}
    group by metric_id
),

posters as (
    select
        image,
        min(source_name) as source_name,
        min(image_path) as image_path
    from {{ source('warehouse', 'current_poster') }}
    where image <> ''
    group by image
)

select
    nearest.generation_key,
    nearest.metric_id,
    nearest.nearest_poster,
    posters.source_name as nearest_poster_name,
    posters.image_path as nearest_poster_path,
    nearest.similarity,
    nearest.similarity_threshold,
    nearest.hash_poster,
    hash_posters.source_name as hash_poster_name,
    hash_posters.image_path as hash_poster_path,
    nearest.hash_distance,
    nearest.hash_threshold,
    nearest.copied
from {{ source('warehouse', 'fct_nearest') }} as nearest
inner join current_metrics on current_metrics.metric_id = nearest.metric_id
inner join {{ ref('stg_current_images') }} as image
    on image.generation_key = nearest.generation_key
left join posters on posters.image = nearest.nearest_poster
left join posters as hash_posters on hash_posters.image = nearest.hash_poster
qualify row_number() over (
    partition by nearest.generation_key
    order by current_metrics.place, nearest.metric_id
) = 1
