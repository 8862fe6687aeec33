with current_keys as (
    select distinct generation_key
    from {{ source('warehouse', 'current_generation') }}
)

select
    image.generation_key,
    image.pixel_key,
    image.variant,
    image.prompt_key,
    image.prompt_id,
    image.negative_prompt,
    image.seed,
    image.checkpoint_id,
    image.image,
    image.image_path,
    image.status,
    image.reason,
    image.width,
    image.height,
    image.settings
from {{ source('warehouse', 'fct_image') }} as image
inner join current_keys on current_keys.generation_key = image.generation_key
