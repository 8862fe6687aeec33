-- Who is served after each decision, by the rules of `core.champion.decisions`: what a person
-- pinned, unless the gate had rejected it or did so since; else what the gate promoted last and did
-- not reject since; else the base model. Each base model has a champion of its own; a decision whose
-- base model is not known counts for all of them.
with current_base as (
    select min(checkpoint_id) as checkpoint_id
    from {{ ref('stg_current_images') }}
    where variant = 'sd'
),

decisions as (
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
        base_model,
        coalesce(decided_by, '') <> 'gate' as by_person,
        decided_by <> 'gate' and json_extract_string(numbers, '$.pinned') = 'true' as pins,
        row_number() over (order by decided_at, rowid) as place
    from {{ source('warehouse', 'fct_promotion') }}
),

-- One row a decision and each one before it about the same base model, itself included.
known as (
    select
        now.place as place_now,
        earlier.place,
        earlier.checkpoint_id,
        earlier.decision,
        earlier.by_person,
        earlier.pins
    from decisions as now
    cross join current_base
    inner join decisions as earlier
        on
            earlier.place <= now.place
            and (
                earlier.base_model is null
                or earlier.base_model = coalesce(now.base_model, current_base.checkpoint_id)
            )
),

verdicts as (
    select * from known
    where not by_person
),

words as (
    select known.*
    from known
    where
        known.by_person
        and not (
            known.pins
            and coalesce((
                select arg_max(verdicts.decision, verdicts.place)
                from verdicts
                where
                    verdicts.place_now = known.place_now
                    and verdicts.checkpoint_id = known.checkpoint_id
                    and verdicts.place < known.place
            ), '') = 'reject'
        )
),

last_word as (
    select
        place_now,
        arg_max(checkpoint_id, place) as checkpoint_id,
        arg_max(pins, place) as pins,
        max(place) as place
    from words
    group by place_now
),

pinned as (
    select
        last_word.place_now,
        last_word.checkpoint_id
    from last_word
    where
        last_word.pins
        and not exists (
            select 1
            from verdicts
            where
                verdicts.place_now = last_word.place_now
                and verdicts.checkpoint_id = last_word.checkpoint_id
                and verdicts.decision = 'reject'
                and verdicts.place > last_word.place
        )
),

accepted as (
    select
        promotion.place_now,
        arg_max(promotion.checkpoint_id, promotion.place) as checkpoint_id
    from verdicts as promotion
    where
        promotion.decision = 'promote'
        and not exists (
            select 1
            from verdicts
            where
                verdicts.place_now = promotion.place_now
                and verdicts.checkpoint_id = promotion.checkpoint_id
                and verdicts.decision = 'reject'
                and verdicts.place > promotion.place
        )
    group by promotion.place_now
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
    decisions.base_model,
    decisions.by_person,
    decisions.pins,
    decisions.place,
    coalesce(
        decisions.base_model = current_base.checkpoint_id, true
    ) as is_of_current_base,
    coalesce(
        pinned.checkpoint_id,
        accepted.checkpoint_id,
        decisions.base_model,
        current_base.checkpoint_id
    ) as champion_after
from decisions
left join pinned on pinned.place_now = decisions.place
left join accepted on accepted.place_now = decisions.place
cross join current_base
