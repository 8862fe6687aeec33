select *
from {{ ref('leaderboard') }}
where
    low_95 > mean
    or high_95 < mean
    or diff_low_95 > diff_to_sd
    or diff_high_95 < diff_to_sd
    or blocked + failed > images
    or (is_headline and mean not between -1 and 1)
