select *
from {{ ref('paired_effects') }}
where
    one_prompt_share not between 0 and 1
    or (rests_on is null) <> (mean_without is null)
    or (
        rests_on is not null
        and (
            one_prompt_share <= {{ one_prompt_share() }}
            or (finding = 'higher' and coalesce(low_95_without, mean_without) <= 0)
            or (finding = 'lower' and coalesce(high_95_without, mean_without) >= 0)
        )
    )
