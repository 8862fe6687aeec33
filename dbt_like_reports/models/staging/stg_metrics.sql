-- `current_metric` holds a metric once for every step that uses it. In a warehouse that was filled
-- before there was that table, all metrics count. `place` goes by step, in whose order the names of
-- steps sort, so that metrics that are measured together stand together.
with used as (
    select
        metric_id,
        bool_or(step = 'clip_scores') as is_headline,
        row_number() over (order by min((step, place))) as place
    from {{ source('warehouse', 'current_metric') }}
    group by metric_id
    union all
    select
        metric_id,
        metric_id like 'clip\_t.crop.%' escape '\' as is_headline,
        1 as place
    from {{ source('warehouse', 'dim_metric') }}
    where not exists (select 1 from {{ source('warehouse', 'current_metric') }})
),

labelled as (
    select
        metric_id,
        coalesce(encoder, '') as encoder,
        coalesce(preprocessing, '') as preprocessing,
        description,
        first_seen_at,
        -- CLIP-T looks at the middle of a poster or at all of it: two metrics of one name.
        case when name = 'CLIP-T' then name || ' ' || preprocessing else name end as label
    from {{ source('warehouse', 'dim_metric') }}
),

told_apart as (
    select
        labelled.*,
        coalesce(used.is_headline, false) as is_headline,
        used.metric_id is not null as is_current,
        used.place,
        count(distinct labelled.encoder) over (
            partition by labelled.label, used.metric_id is not null
        ) as encoders
    from labelled
    left join used on used.metric_id = labelled.metric_id
),

named as (
    select
        *,
        case when encoders > 1 then label || ' (' || encoder || ')' else label end as name
    from told_apart
)

select
    metric_id,
    -- Of two versions of one encoder, or of one metric, nothing but the id tells them apart.
    case
        when is_current and count(*) over (partition by name, is_current) > 1
            then name || ' (' || metric_id || ')'
        else name
    end as metric,
    encoder,
    preprocessing,
    description,
    case
        -- How near an image comes to posters is style as much as copying: what counts is the share
        -- beyond the bound (overfit_and_copy).
        when regexp_matches(metric_id, '^(similarity[.]training|nearest|phash)[.]') then 'neither'
        when metric_id like 'clip_control.%' then 'neither'
        -- 0 is no ideal of the gap: it holds how the two sets of posters differ, and that of the
        -- base model, which saw neither, is what to compare with.
        when metric_id like 'overfit_gap.%' or metric_id like 'title_distance.%' then 'lower'
        else 'higher'
    end as better,
    case when metric_id like 'diversity.%' then 'ratio' else 'difference' end as scale,
    is_headline,
    is_current,
    place,
    first_seen_at
from named
