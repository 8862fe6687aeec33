select
    metric_id,
    variant
from {{ ref('leaderboard') }}
group by metric_id, variant
having count(*) > 1
