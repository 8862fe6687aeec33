-- Who is served after each decision, by the rules of `posterpipe.core.gate`: what a person pinned,
-- unless the gate rejected it since; else what the gate promoted last and did not reject since;
-- else the base model.
with decisions as (
    select
        decision_id,
        decided_at,
        checkpoint_id,
        champion_before,
        decision,
        reason,
        numbers,
        decided_by,
        run_id,
        coalesce(decided_by, '') <> 'gate' as by_person,
        decided_by <> 'gate' and json_extract_string(numbers, '$.pinned') = 'true' as pins,
        row_number() over (order by decided_at, rowid) as place
    from {{ source('warehouse', 'fct_promotion') }}
),

rejections as (
    select
        checkpoint_id,
        place
    from decisions
    where decision = 'reject' and not by_person
),

promotions as (
    select
        checkpoint_id,
        place
    from decisions
    where decision = 'promote' and not by_person
),

base_model as (
    select min(checkpoint_id) as checkpoint_id
    from {{ ref('stg_current_images') }}
    where variant = 'sd'
),

last_word as (
    select
        now.place,
        arg_max(person.checkpoint_id, person.place) filter (where person.pins) as checkpoint_id,
        max(person.place) as place_of_word,
        arg_max(person.pins, person.place) as pins
    from decisions as now
    inner join decisions as person on person.by_person and person.place <= now.place
    group by now.place
),

pinned as (
    select
        last_word.place,
        last_word.checkpoint_id
    from last_word
    where
        last_word.pins
        and not exists (
            select 1
            from rejections
            where
                rejections.checkpoint_id = last_word.checkpoint_id
                and rejections.place > last_word.place_of_word
                and rejections.place <= last_word.place
        )
),

accepted as (
    select
        now.place,
        arg_max(promotions.checkpoint_id, promotions.place) as checkpoint_id
    from decisions as now
    inner join promotions on promotions.place <= now.place
    where not exists (
        select 1
        from rejections
        where
            rejections.checkpoint_id = promotions.checkpoint_id
            and rejections.place > promotions.place
            and rejections.place <= now.place
    )
    group by now.place
)

select
    decisions.decision_id,
    decisions.decided_at,
    decisions.checkpoint_id,
    decisions.champion_before,
    decisions.decision,
    decisions.reason,
    decisions.numbers,
    decisions.decided_by,
    decisions.run_id,
    decisions.by_person,
    decisions.pins,
    decisions.place,
    coalesce(
        pinned.checkpoint_id,
        accepted.checkpoint_id,
        base_model.checkpoint_id
    ) as champion_after
from decisions
left join pinned on pinned.place = decisions.place
left join accepted on accepted.place = decisions.place
cross join base_model
