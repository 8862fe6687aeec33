-- The checks behind each decision of the gate, unfolded from its JSON.
with decisions as (
    select * from {{ ref('stg_decisions') }}
),

checks as (
    select
        decision_id,
        decided_at,
        checkpoint_id,
        place as decision_place,
        unnest(from_json(json_extract(numbers, '$.checks'), '["json"]')) as told,
        generate_subscripts(from_json(json_extract(numbers, '$.checks'), '["json"]'), 1) as place
    from decisions
    where json_array_length(json_extract(numbers, '$.checks')) > 0
)

select
    decision_id,
    decided_at,
    checkpoint_id,
    cast(place as bigint) as place,
    json_extract_string(told, '$.name') as check_name,
    json_extract_string(told, '$.outcome') as outcome,
    cast(json_extract_string(told, '$.value') as double) as value,
    cast(json_extract_string(told, '$.low') as double) as low_95,
    cast(json_extract_string(told, '$.high') as double) as high_95,
    cast(json_extract_string(told, '$.limit') as double) as limit_value,
    cast(json_extract_string(told, '$.detectable') as double) as detectable,
    json_extract_string(told, '$.reason') as reason
from checks
order by
    decision_place,
    place
