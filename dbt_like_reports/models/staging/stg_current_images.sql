select
    generation_key,
    pixel_key,
    variant,
    prompt_key,
    prompt_id,
    negative_prompt,
    seed,
    checkpoint_id,
    image,
    image_path,
    status,
    reason,
    width,
    height,
    settings,
    {{ question('prompt_key', 'settings') }} as question,
    hash(negative_prompt, json_extract_string(settings, '$.negative_from')) as negative_key
from {{ source('warehouse', 'fct_image') }}
where generation_key in (select generation_key from {{ source('warehouse', 'current_generation') }})
