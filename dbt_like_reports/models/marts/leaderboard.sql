-- Seeds of one prompt are not independent answers: they are averaged, and n is the prompts.
--
-- Millions of scores are joined to their images once and added up by numbers instead of names.
-- Differences are between images of the same prompt and seed, asked in the same words and drawn with
-- the same sampler: those of a variant and prompt are of one table, so all alike in that. A seed of
-- which a variant lacks the image (a black one, say) is kept apart from the sum of the prompt's
-- others, so that it can be left out of the differences that lack it. Only where a metric lacks
-- further scores are the pairs looked up, and a score without its partner left out. Where a prompt
-- has no negative prompt, a negative variant is the image of the one without again, and no answer.
with metrics as materialized (
    select
        *,
        row_number() over () as number
    from {{ ref('stg_metrics') }}
    where is_current
),

-- Hashes stand for names: of 64 bits, they are added up by faster, and are found without a join.
images as (
    select
        generation_key,
        seed,
        hash(variant, prompt_id) as answer,
        case
            when
                (prompt_id, seed) in (
                    select (prompt_id, seed) from {{ ref('stg_current_images') }}
                    where status <> 'ok'
                )
                then seed
        end as seed_apart,
        generation_key in (
            select generation_key from {{ source('warehouse', 'fct_title') }}
        ) as is_lettered
    from {{ ref('stg_current_images') }}
),

numbered_images as materialized (
    select
        generation_key,
        answer,
        seed,
        hash(seed) as seed_number,
        seed_apart,
        is_lettered,
        hash(answer, seed_apart, is_lettered) as part
    from images
),

-- What is said of a part in names, once for its images.
named_parts as materialized (
    select
        part,
        any_value(answer) as answer,
        any_value(seed_apart) as seed_apart,
        any_value(is_lettered) as is_lettered,
        any_value(generation_key) as generation_key
    from numbered_images
    group by part
),

answers as materialized (
    select
        image.variant,
        image.prompt_id,
        image.checkpoint_id,
        image.variant <> 'sd'
            and (image.variant not like '%negative%' or image.negative_prompt <> '')
            as is_compared,
        {{ question('image.prompt_key', 'image.settings') }} as question,
        firsts.answer
    from (
        select
            answer,
            any_value(generation_key) as generation_key
        from named_parts
        group by answer
    ) as firsts
    inner join {{ ref('stg_current_images') }} as image
        on image.generation_key = firsts.generation_key
),

numbered_parts as (
    select
        metrics.number as metric,
        image.part,
        count(*) as images,
        count(score.value) as scored,
        count(if(score.value is null and score.status = 'blocked', 1, null)) as blocked,
        sum(score.value) as total,
        sum(least(score.value, 0)) as below_0,
        bit_xor(if(score.value is null, 0, image.seed_number)) as seeds
    from {{ source('warehouse', 'fct_score') }} as score
    inner join numbered_images as image on image.generation_key = score.generation_key
    inner join metrics on metrics.metric_id = score.metric_id
    group by metrics.number, image.part
),

parts as materialized (
    select
        metrics.metric_id,
        named_parts.answer,
        named_parts.seed_apart,
        numbered_parts.images,
        numbered_parts.scored,
        numbered_parts.blocked,
        numbered_parts.total,
        numbered_parts.below_0,
        numbered_parts.seeds
    from numbered_parts
    inner join metrics on metrics.number = numbered_parts.metric
    inner join named_parts on named_parts.part = numbered_parts.part
    where {{ is_asked('metrics.metric_id', 'named_parts.is_lettered') }}
),

sums as (
    select
        metric_id,
        answer,
        sum(images) as images,
        sum(scored) as scored,
        sum(blocked) as blocked,
        sum(total) / sum(scored) as mean,
        sum(below_0) / sum(scored) as mean_below_0
    from parts
    group by metric_id, answer
),

prompts as (
    select
        sums.metric_id,
        answers.variant,
        answers.prompt_id,
        answers.checkpoint_id,
        sums.images,
        sums.scored,
        sums.blocked,
        {{ as_averaged('sums.mean', 'metrics.scale') }} as mean,
        -- 2.5 x max(cosine, 0) of each image, then the mean (Hessel et al. 2021).
        case
            when sums.metric_id like 'clip\_t.%' escape '\'
                then 2.5 * (sums.mean - sums.mean_below_0)
        end as clip_score
    from sums
    inner join answers on answers.answer = sums.answer
    inner join metrics on metrics.metric_id = sums.metric_id
),

-- Materialized, as `others` below, so that the next join has all of its keys: without the answer,
-- each part meets those of all prompts.
compared_parts as materialized (
    select
        parts.metric_id,
        answers.variant,
        answers.prompt_id,
        answers.answer,
        base.answer as base_answer,
        parts.seed_apart,
        parts.scored,
        parts.total,
        parts.seeds
    from answers
    inner join answers as base
        on
            base.variant = 'sd'
            and base.prompt_id = answers.prompt_id
            and base.question = answers.question
    inner join parts on parts.answer = answers.answer
    where answers.is_compared
),

beside_sd as (
    select
        own.metric_id,
        own.variant,
        own.prompt_id,
        own.answer,
        own.base_answer,
        metrics.scale,
        sum(own.scored) as pairs,
        sum(own.total) / sum(own.scored) as other,
        sum(base.total) / sum(base.scored) as base,
        bool_and(own.scored = base.scored and own.seeds is not distinct from base.seeds)
            as is_complete
    from compared_parts as own
    inner join parts as base
        on
            base.answer = own.base_answer
            and base.metric_id = own.metric_id
            and base.seed_apart is not distinct from own.seed_apart
    inner join metrics on metrics.metric_id = own.metric_id
    where own.seed_apart is null or (own.scored > 0 and base.scored > 0)
    group by
        own.metric_id,
        own.variant,
        own.prompt_id,
        own.answer,
        own.base_answer,
        metrics.scale
),

incomplete as (
    select
        metric_id,
        answer,
        base_answer
    from beside_sd
    where not is_complete
),

incomplete_scores as materialized (
    select
        score.metric_id,
        image.answer,
        image.seed,
        score.value
    from {{ source('warehouse', 'fct_score') }} as score
    inner join numbered_images as image on image.generation_key = score.generation_key
    where
        score.metric_id in (select metric_id from incomplete)
        and image.answer in (
            select answer from incomplete
            union
            select base_answer from incomplete
        )
        and {{ is_asked('score.metric_id', 'image.is_lettered') }}
),

others as materialized (
    select
        incomplete.metric_id,
        incomplete.answer,
        incomplete.base_answer,
        other.seed,
        other.value
    from incomplete
    inner join incomplete_scores as other
        on other.metric_id = incomplete.metric_id and other.answer = incomplete.answer
    where other.value is not null
),

pairs_looked_up as (
    select
        others.metric_id,
        others.answer,
        count(*) as pairs,
        avg(others.value) as other,
        avg(base.value) as base
    from others
    inner join incomplete_scores as base
        on
            base.metric_id = others.metric_id
            and base.answer = others.base_answer
            and base.seed = others.seed
    where base.value is not null
    group by others.metric_id, others.answer
),

pairs as (
    select
        beside_sd.metric_id,
        beside_sd.variant,
        beside_sd.prompt_id,
        beside_sd.scale,
        if(beside_sd.is_complete, beside_sd.pairs, looked_up.pairs) as pairs,
        if(beside_sd.is_complete, beside_sd.other, looked_up.other) as other,
        if(beside_sd.is_complete, beside_sd.base, looked_up.base) as base
    from beside_sd
    left join pairs_looked_up as looked_up
        on looked_up.metric_id = beside_sd.metric_id and looked_up.answer = beside_sd.answer
),

prompt_differences as (
    select
        metric_id,
        variant,
        prompt_id,
        pairs,
        {{ as_averaged('other', 'scale') }} - {{ as_averaged('base', 'scale') }} as difference
    from pairs
),

means as (
    select
        metric_id,
        variant,
        min(checkpoint_id) as checkpoint_id,
        count(mean) as prompts,
        cast(sum(images) as bigint) as images,
        cast(sum(blocked) as bigint) as blocked,
        cast(sum(images) - sum(scored) - sum(blocked) as bigint) as failed,
        avg(mean) as mean,
        bootstrap_interval(list(mean order by prompt_id)) as ends,
        avg(clip_score) as clip_score,
        bootstrap_interval(list(clip_score order by prompt_id)) as clip_score_ends
    from prompts
    group by metric_id, variant
),

differences as (
    select
        metric_id,
        variant,
        count(difference) as prompts,
        cast(sum(pairs) as bigint) as pairs,
        avg(difference) as mean,
        bootstrap_interval(list(difference order by prompt_id)) as ends
    from prompt_differences
    group by metric_id, variant
)

select
    means.metric_id,
    metrics.metric,
    metrics.better,
    metrics.scale,
    metrics.is_headline,
    means.variant,
    means.checkpoint_id,
    means.prompts,
    means.images,
    means.blocked,
    means.failed,
    round({{ as_mean('means.mean', 'metrics.scale') }}, 6) as mean,
    {{ within_range(as_mean('means.ends.low', 'metrics.scale'), 'means.metric_id') }} as low_95,
    {{ within_range(as_mean('means.ends.high', 'metrics.scale'), 'means.metric_id') }}
        as high_95,
    coalesce(differences.prompts, 0) as diff_prompts,
    coalesce(differences.pairs, 0) as pairs,
    round({{ as_difference('differences.mean', 'metrics.scale') }}, 6) as diff_to_sd,
    {{ difference_within_range('differences.ends.low', 'means.metric_id', 'metrics.scale') }}
        as diff_low_95,
    {{ difference_within_range('differences.ends.high', 'means.metric_id', 'metrics.scale') }}
        as diff_high_95,
    round(means.clip_score, 6) as clip_score,
    case when means.clip_score_ends is not null then round(greatest(0, means.clip_score_ends.low), 6)
    end as clip_score_low_95,
    case
        when means.clip_score_ends is not null
            then round(least(2.5, means.clip_score_ends.high), 6)
    end as clip_score_high_95
from means
inner join metrics on metrics.metric_id = means.metric_id
left join differences
    on differences.metric_id = means.metric_id and differences.variant = means.variant
order by
    metrics.is_headline desc,
    metrics.place,
    means.metric_id,
    list_position({{ var('variants') }}, means.variant)
