with decisions as (
    select * from {{ ref('stg_decisions') }}
),

checks as (
    select
        decision_id,
        count(*) filter (where outcome = 'pass') as passed,
        count(*) filter (where outcome = 'fail') as failed,
        count(*) filter (where outcome = 'open') as undecided
    from {{ ref('gate_checks') }}
    group by decision_id
),

checkpoints as (
    select * from {{ source('warehouse', 'dim_checkpoint') }}
)

select
    decisions.decision_id,
    decisions.decided_at,
    decisions.checkpoint_id,
    checkpoints.trained_at,
    decisions.base_model,
    decisions.champion_before,
    decisions.decision,
    decisions.reason,
    coalesce(decisions.decided_by, 'gate') as decided_by,
    decisions.by_person,
    coalesce(decisions.pins, false) as pins,
    coalesce(checks.passed, 0) as checks_passed,
    coalesce(checks.failed, 0) as checks_failed,
    coalesce(checks.undecided, 0) as checks_undecided,
    cast(json_extract_string(decisions.numbers, '$.expected') as bigint) as expected_images,
    cast(json_extract_string(decisions.numbers, '$.missing') as bigint) as missing_images,
    cast(json_extract_string(decisions.numbers, '$.blocked') as bigint) as blocked_images,
    cast(
        json_extract_string(decisions.numbers, '$.missing_of_champion') as bigint
    ) as champion_missing_images,
    cast(
        json_extract_string(decisions.numbers, '$.blocked_of_champion') as bigint
    ) as champion_blocked_images,
    cast(
        json_extract_string(decisions.numbers, '$.missing_of_base') as bigint
    ) as base_missing_images,
    cast(json_extract_string(decisions.numbers, '$.compared') as bigint) as compared_images,
    cast(json_extract_string(decisions.numbers, '$.copies') as bigint) as copied_images,
    cast(json_extract_string(decisions.numbers, '$.sensitivity') as double) as copy_sensitivity,
    cast(json_extract_string(decisions.numbers, '$.lost') as bigint) as lost_posters,
    cast(json_extract_string(decisions.numbers, '$.unsure') as bigint) as unsure_images,
    {%- for name in ('specific', 'preference') %}
    cast(
        json_extract_string(decisions.numbers, '$.{{ name }}.estimate') as double
    ) as {{ name }}_difference,
    cast(json_extract_string(decisions.numbers, '$.{{ name }}.low') as double) as {{ name }}_low_95,
    cast(json_extract_string(decisions.numbers, '$.{{ name }}.high') as double) as {{ name }}_high_95,
    cast(
        json_extract_string(decisions.numbers, '$.{{ name }}.prompts') as bigint
    ) as {{ name }}_prompts,
    {%- endfor %}
    cast(
        json_extract_string(decisions.numbers, '$.preference.win_rate') as double
    ) as preference_win_rate,
    cast(
        json_extract_string(decisions.numbers, '$.preference.win_low') as double
    ) as preference_win_low_95,
    cast(
        json_extract_string(decisions.numbers, '$.preference.win_high') as double
    ) as preference_win_high_95,
    decisions.champion_after,
    decisions.place = max(decisions.place) over () as is_latest
from decisions
left join checks on checks.decision_id = decisions.decision_id
left join checkpoints on checkpoints.checkpoint_id = decisions.checkpoint_id
order by decisions.place
