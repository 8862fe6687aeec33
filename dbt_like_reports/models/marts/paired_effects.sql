-- The thesis's 2 x 2 design (tuned or not, with the negative prompt or without), asked eight
-- questions, and two more where the suite delays the negative prompt. Weights are those of the
-- variants' values; a cell that lacks a variant of the comparison is left out, and so is one whose
-- models were asked in other words, drew with another sampler, or had another negative prompt. Where a prompt has
-- no negative prompt, a negative variant is the image of the one without again, and no answer.
{% set primary = 'tuned without negative' %}
{% set variants = var('variants') %}
with scores as (
    select * from {{ ref('stg_current_scores') }}
),

comparisons as (
    select
        *,
        -- How many differences between two values it adds up.
        (
            {%- for variant in variants %}
            abs({{ variant }}){{ ' +' if not loop.last }}
            {%- endfor %}
        ) / 2 as differences
    from (
        values
            (1, 'tuned', 'tuned vs base, whatever the negative prompt', -.5, -.5, .5, .5, 0, 0),
            (2, 'negative', 'negative prompt vs none, whatever the model', -.5, .5, -.5, .5, 0, 0),
            (3, 'tuned without negative', 'tuned vs base, no negative prompt', -1, 0, 1, 0, 0, 0),
            (4, 'tuned with negative', 'tuned vs base, both with negative', 0, -1, 0, 1, 0, 0),
            (5, 'negative on base', 'negative prompt vs none, base model', -1, 1, 0, 0, 0, 0),
            (6, 'negative on tuned', 'negative prompt vs none, tuned model', 0, 0, -1, 1, 0, 0),
            (7, 'both', 'tuned with negative prompt vs base without', -1, 0, 0, 1, 0, 0),
            (8, 'interaction', 'what the negative prompt does more when tuned', 1, -1, -1, 1, 0, 0),
            (9, 'late negative on base', 'late negative vs full, base model', 0, -1, 0, 0, 1, 0),
            (10, 'late negative on tuned', 'late negative vs full, tuned model', 0, 0, 0, -1, 0, 1)
    ) as listed (
        place,
        comparison,
        question,
        sd,
        sd_negative,
        dreambooth,
        dreambooth_negative,
        sd_negative_delayed,
        dreambooth_negative_delayed
    )
),

cells as (
    select
        metric_id,
        prompt_id,
        seed,
        {%- for variant in variants %}
        max(value) filter (
            where variant = '{{ variant }}'
            {%- if 'negative' in variant %} and negative_prompt <> ''{% endif %}
        ) as {{ variant }},
        {%- endfor %}
        -- The late one is compared with the full one of its own model only.
        min(negative_key) filter (where variant = 'sd_negative')
        = min(negative_key) filter (where variant = 'dreambooth_negative') as is_one_negative
    from scores
    group by metric_id, prompt_id, seed, question
),

complete_cells as (
    select
        cells.*,
        comparisons.comparison
    from cells
    inner join comparisons
        on
            true
            {%- for variant in variants %}
            and (comparisons.{{ variant }} = 0 or cells.{{ variant }} is not null)
            {%- endfor %}
            and (
                comparisons.sd_negative = 0
                or comparisons.dreambooth_negative = 0
                or cells.is_one_negative
            )
),

prompt_means as (
    select
        metric_id,
        comparison,
        prompt_id,
        count(*) as pairs,
        {%- for variant in variants %}
        avg({{ variant }}) as {{ variant }}{{ ',' if not loop.last }}
        {%- endfor %}
    from complete_cells
    group by metric_id, comparison, prompt_id
),

metrics as (
    select * from {{ ref('stg_metrics') }}
),

prompt_differences as (
    select
        prompt_means.metric_id,
        prompt_means.comparison,
        prompt_means.prompt_id,
        prompt_means.pairs,
        {%- for variant in variants %}
        case
            when comparisons.{{ variant }} = 0 then 0
            else
                comparisons.{{ variant }}
                * {{ as_averaged('prompt_means.' ~ variant, 'metrics.scale') }}
        end{{ ' +' if not loop.last else ' as difference' }}
        {%- endfor %}
    from prompt_means
    inner join comparisons on comparisons.comparison = prompt_means.comparison
    inner join metrics on metrics.metric_id = prompt_means.metric_id
),

estimates as (
    select
        metric_id,
        comparison,
        count(*) as prompts,
        sum(pairs) as pairs,
        avg(difference) as mean,
        stddev_samp(difference) as deviation,
        bootstrap_interval(list(difference order by prompt_id)) as ends,
        list(difference order by prompt_id) as differences,
        min(difference) as lowest,
        max(difference) as highest,
        arg_min(prompt_id, difference) as lowest_prompt,
        arg_max(prompt_id, difference) as highest_prompt,
        -- A tie is one by rounding as well.
        (count(*) + sum(case when abs(difference) > {{ no_spread() }} then sign(difference) else 0 end))
        / 2 as positives
    from prompt_differences
    group by metric_id, comparison
),

-- The most deviating prompt is the lowest one or the highest.
furthest as (
    select
        *,
        case
            when deviation > {{ no_spread() }} then
                pow(greatest(mean - lowest, highest - mean), 2)
                / ((prompts - 1) * deviation * deviation)
        end as one_prompt_share,
        if(highest - mean > mean - lowest, highest, lowest) as furthest,
        if(highest - mean > mean - lowest, highest_prompt, lowest_prompt) as furthest_prompt
    from estimates
),

-- Where one prompt has most of the spread, what the others say without it.
resting as (
    select
        *,
        case
            when one_prompt_share > {{ one_prompt_share() }} and prompts >= {{ one_prompt_among() }}
                then furthest_prompt
        end as rests_on
    from furthest
),

without_one as (
    select
        *,
        case when rests_on is not null then (mean * prompts - furthest) / (prompts - 1) end
            as mean_without,
        bootstrap_interval(
            case
                when rests_on is not null
                    then [one for one in differences if one <> furthest]
            end
        ) as ends_without
    from resting
),

-- Which side is the better one, the metric says; of some, neither is.
sided as (
    select
        estimates.*,
        case metrics.better
            when 'higher' then estimates.positives
            when 'lower' then estimates.prompts - estimates.positives
        end as wins
    from without_one as estimates
    inner join metrics on metrics.metric_id = estimates.metric_id
),

measured as (
    select
        estimates.metric_id,
        metrics.metric,
        metrics.better,
        metrics.scale,
        metrics.is_headline,
        -- Two questions were named beforehand: whether scores rise, and whether an image's own
        -- text stands out from those of the other prompts. The second checks what the first is
        -- worth, so that no metric that is asked beside it may make it harder to answer.
        -- Guards watch for harm: whoever asks about many other things should not find less of it.
        case
            when metrics.is_headline then 'headline'
            when starts_with(metrics.metric_id, 'clip_specific.') then 'specific'
            when regexp_matches(metrics.metric_id, '^(overfit_gap|nearest|phash|diversity)[.]')
                then 'guard'
            else 'other'
        end as family,
        estimates.comparison,
        comparisons.question,
        estimates.prompts,
        cast(estimates.pairs as bigint) as pairs,
        round({{ as_difference('estimates.mean', 'metrics.scale') }}, 6) as mean_difference,
        {{ difference_within_range(
            'estimates.ends.low', 'estimates.metric_id', 'metrics.scale', 'comparisons.differences'
        ) }} as low_95,
        {{ difference_within_range(
            'estimates.ends.high', 'estimates.metric_id', 'metrics.scale', 'comparisons.differences'
        ) }} as high_95,
        round(estimates.one_prompt_share, 6) as one_prompt_share,
        estimates.rests_on,
        round({{ as_difference('estimates.mean_without', 'metrics.scale') }}, 6) as mean_without,
        {{ difference_within_range(
            'estimates.ends_without.low', 'estimates.metric_id', 'metrics.scale',
            'comparisons.differences'
        ) }} as low_95_without,
        {{ difference_within_range(
            'estimates.ends_without.high', 'estimates.metric_id', 'metrics.scale',
            'comparisons.differences'
        ) }} as high_95_without,
        {{ largest_difference('estimates.metric_id', 'metrics.scale', 'comparisons.differences') }}
            as largest,
        {{ t_p_value('estimates.mean', 'estimates.deviation', 'estimates.prompts') }} as p_value,
        -- Hedges' g: the mean over the deviation, corrected for few prompts.
        case
            when estimates.prompts > 2 and abs(estimates.mean) <= {{ no_spread() }} then 0
            when estimates.prompts > 2 and estimates.deviation > {{ no_spread() }} then
                round(
                    estimates.mean / estimates.deviation
                    * (1 - 3 / (4 * (estimates.prompts - 1) - 1)),
                    6
                )
        end as effect_size,
        round(estimates.wins / estimates.prompts, 6) as win_rate,
        {{ wilson_interval('estimates.wins', 'estimates.prompts', '-') }} as win_low_95,
        {{ wilson_interval('estimates.wins', 'estimates.prompts', '+') }} as win_high_95,
        estimates.deviation,
        metrics.is_headline and estimates.comparison = '{{ primary }}' as is_primary,
        metrics.place as metric_place,
        comparisons.place as comparison_place
    from sided as estimates
    inner join comparisons on comparisons.comparison = estimates.comparison
    inner join metrics on metrics.metric_id = estimates.metric_id
),

-- Many questions have many chances of a false alarm. Holm (1979): the smallest p-value of a family
-- counts as often as it has questions, the next once less, and so on. The comparisons of the
-- headline metric are one family, those of CLIP-T specific another, those of all guards a third,
-- those of all other metrics a fourth.
ranked as (
    select
        *,
        count(p_value) over (partition by family) as questions,
        p_value * (
            count(p_value) over (partition by family)
            - row_number() over (
                partition by family
                order by p_value nulls last, metric_id, comparison_place
            )
            + 1
        ) as p_counted
    from measured
),

corrected as (
    select
        *,
        case
            when p_value is not null then
                least(1, max(p_counted) over (
                    partition by family
                    order by p_value nulls last, metric_id, comparison_place
                    rows between unbounded preceding and current row
                ))
        end as p_adjusted,
        -- The first of the questions that were named beforehand stands alone.
        case when is_primary then 1 else questions end as counted
    from ranked
),

-- What a study of this size finds with a power of 80 % (Bloom 1995), where the p-value has to pass
-- the correction of the smallest one.
studied as (
    select
        *,
        case
            when deviation > {{ no_spread() }} then
                (
                    student_quantile(1 - 0.025 / counted, prompts - 1)
                    + student_quantile(0.8, prompts - 1)
                ) * deviation / sqrt(prompts)
        end as detectable
    from corrected
)

select
    metric_id,
    metric,
    better,
    scale,
    is_headline,
    is_primary,
    family,
    comparison,
    question,
    prompts,
    pairs,
    mean_difference,
    low_95,
    high_95,
    -- Of all but the first question that was named beforehand, one in twenty would find something
    -- by chance. Without an interval all prompts differ by the same. What rests on one prompt has to
    -- be there without that prompt as well.
    case
        when prompts < 2 then 'too few prompts'
        when p_value is null then 'all alike'
        when not is_primary and p_adjusted >= 0.05 then 'not told apart'
        when low_95 > 0 and coalesce(low_95_without, mean_without) <= 0 then 'not told apart'
        when high_95 < 0 and coalesce(high_95_without, mean_without) >= 0 then 'not told apart'
        when low_95 > 0 or (low_95 is null and p_value < 0.05 and mean_difference > 0)
            then 'higher'
        when high_95 < 0 or (low_95 is null and p_value < 0.05 and mean_difference < 0)
            then 'lower'
        else 'not told apart'
    end as finding,
    one_prompt_share,
    rests_on,
    mean_without,
    low_95_without,
    high_95_without,
    p_value,
    p_adjusted,
    effect_size,
    win_rate,
    win_low_95,
    win_high_95,
    -- None that a metric can have may be large enough.
    case
        when detectable > largest then null
        else round({{ as_difference('detectable', 'scale') }}, 6)
    end as detectable_difference
from studied
order by
    is_headline desc,
    metric_place,
    metric_id,
    comparison_place
