select *
from {{ ref('leaderboard') }}
where
    mean_clip_cosine not between -1 and 1
    or low_95 > mean_clip_cosine
    or high_95 < mean_clip_cosine
    or blocked > images
