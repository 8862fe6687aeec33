-- What older checkpoints answered to the questions of today: images of the cells (variant, prompt
-- in its wording, seed, negative prompt, sampler) of the current images. What was asked otherwise is
-- not comparable. One image a cell: the current one, else the one that was recorded last, since
-- another version of the sampler draws under another key.
with current_images as (
    select * from {{ ref('stg_current_images') }}
),

answers as (
    select
        image.generation_key,
        image.checkpoint_id,
        image.variant,
        image.prompt_id,
        image.seed,
        image.negative_prompt,
        image.recorded_at,
        current_images.question,
        bool_or(image.generation_key = current_images.generation_key) as is_current
    from {{ source('warehouse', 'fct_image') }} as image
    inner join current_images
        on
            current_images.variant = image.variant
            and current_images.prompt_key = image.prompt_key
            and current_images.seed = image.seed
            and current_images.negative_prompt = image.negative_prompt
            and current_images.settings is not distinct from image.settings
    group by
        image.generation_key,
        image.checkpoint_id,
        image.variant,
        image.prompt_id,
        image.seed,
        image.negative_prompt,
        image.recorded_at,
        current_images.question
)

select
    generation_key,
    checkpoint_id,
    variant,
    prompt_id,
    seed,
    negative_prompt,
    question,
    is_current
from answers
qualify row_number() over (
    partition by checkpoint_id, variant, prompt_id, seed
    order by is_current desc, recorded_at desc, generation_key
) = 1
