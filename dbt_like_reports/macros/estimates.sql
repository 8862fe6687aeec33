{#
  A deviation of values that are the same but for their last digits. Then prompts say nothing about
  how others would vary: no interval, and no detectable difference.
#}
{% macro no_spread() -%} 1e-9 {%- endmacro %}

{#
  A mean of which one prompt has more than this share of the sum of squared deviations rests on that
  prompt, where there are so many prompts or more; why, says core/statistics.py.
#}
{% macro one_prompt_share() -%} 0.6 {%- endmacro %}
{% macro one_prompt_among() -%} 12 {%- endmacro %}

{#
  Means of diversity below it count as this one: 0 has no logarithm, and below it images are one
  picture for all that an encoder tells.
#}
{% macro ratio_floor() -%} 1e-4 {%- endmacro %}

{#
  A prompt's mean as it is averaged and compared. Where the metric's scale is `ratio`, prompts differ
  by orders of magnitude: then its logarithm, so that not one prompt decides (core/statistics.py).
#}
{% macro as_averaged(mean, scale) -%}
    case
        when {{ scale }} <> 'ratio' or {{ mean }} is null then {{ mean }}
        else ln(greatest({{ mean }}, {{ ratio_floor() }}))
    end
{%- endmacro %}

{# A mean over prompts of `as_averaged`, in the metric's own unit: the geometric one of a `ratio`. #}
{% macro as_mean(mean, scale) -%}
    case when {{ scale }} = 'ratio' then exp({{ mean }}) else {{ mean }} end
{%- endmacro %}

{# A difference of `as_averaged`, or one to be added to it: of a `ratio` that less 1. #}
{% macro as_difference(difference, scale) -%}
    case when {{ scale }} = 'ratio' then exp({{ difference }}) - 1 else {{ difference }} end
{%- endmacro %}

{#
  The lowest (`end` is 0) or highest (1) value that a metric can have; NULL where there is none, as of
  PickScore. Cosines lie between -1 and 1, and one less another between -2 and 2.
#}
{% macro range_end(metric_id, end) -%}
    case
        when regexp_matches({{ metric_id }}, '^(title_|clip_rank[.])') then {{ [0, 1][end] }}
        when regexp_matches({{ metric_id }}, '^(clip_t|clip_control|similarity|nearest)[.]')
            then {{ [-1, 1][end] }}
        when regexp_matches({{ metric_id }}, '^(clip_specific|overfit_gap)[.]')
            then {{ [-2, 2][end] }}
        when starts_with({{ metric_id }}, 'diversity.') then {{ [0, 2][end] }}
        when starts_with({{ metric_id }}, 'phash.') then {{ [0, 64][end] }}
    end
{%- endmacro %}

{#
  An end of an interval of a metric, which does not leave the metric's range: that of few prompts
  would. (greatest() and least() pass over NULL, which has to stay where it is the value.)
#}
{% macro within_range(value, metric_id) -%}
    case
        when {{ value }} is not null then
            round(
                least(
                    greatest({{ value }}, {{ range_end(metric_id, 0) }}),
                    {{ range_end(metric_id, 1) }}
                ),
                6
            )
    end
{%- endmacro %}

{#
  The largest difference of `as_averaged` that a metric can have, `times` over: differences of
  differences have two. NULL where there is none.
#}
{% macro largest_difference(metric_id, scale, times=1) -%}
    {{ times }} * case
        when {{ scale }} = 'ratio' then ln({{ range_end(metric_id, 1) }} / {{ ratio_floor() }})
        else {{ range_end(metric_id, 1) }} - {{ range_end(metric_id, 0) }}
    end
{%- endmacro %}

{# An end of an interval of a difference of `as_averaged`, as `as_difference`, likewise in range. #}
{% macro difference_within_range(difference, metric_id, scale, times=1) -%}
    {%- set largest = largest_difference(metric_id, scale, times) -%}
    case
        when {{ difference }} is not null then
            round(
                {{ as_difference(
                    "least(greatest(" ~ difference ~ ", -(" ~ largest ~ ")), " ~ largest ~ ")", scale
                ) }},
                6
            )
    end
{%- endmacro %}

{#
  Two-sided p-value of no mean difference over prompts by Student's t: the distribution has a closed
  form for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4). Where all prompts differ
  by the same, there is no t; then that of their signs, which chance gives all alike 2 times of 2^n.
  NULL with fewer than two prompts, and where none differs: that asks no question.
#}
{% macro t_p_value(mean, deviation, count) -%}
    {%- set degrees = "(" ~ count ~ " - 1)" -%}
    {%- set t_squared = "(" ~ mean ~ " * " ~ mean ~ " * " ~ count ~ " / (" ~ deviation ~ " * " ~ deviation ~ "))" -%}
    {%- set sine = "sqrt(" ~ t_squared ~ " / (" ~ degrees ~ " + " ~ t_squared ~ "))" -%}
    {%- set cosine_squared = "(" ~ degrees ~ " / (" ~ degrees ~ " + " ~ t_squared ~ "))" -%}
    case
        when {{ count }} < 2 then null
        when {{ deviation }} <= {{ no_spread() }} and abs({{ mean }}) <= {{ no_spread() }} then null
        when {{ deviation }} <= {{ no_spread() }} then pow(2.0, 1 - {{ count }})
        when {{ mean }} = 0 then 1
        when {{ degrees }} % 2 = 0 then
            greatest(0, round(1 - {{ sine }} * list_sum([
                exp(lgamma(k + 0.5) - lgamma(k + 1)) / sqrt(pi()) * pow({{ cosine_squared }}, k)
                for k in range(0, {{ degrees }} // 2)
            ]), 6))
        else
            greatest(0, round(1 - 2 / pi() * (
                asin({{ sine }})
                + {{ sine }} * sqrt({{ cosine_squared }}) * coalesce(list_sum([
                    exp(lgamma(k + 1) - lgamma(k + 1.5)) * sqrt(pi()) / 2
                    * pow({{ cosine_squared }}, k)
                    for k in range(0, {{ degrees }} // 2)
                ]), 0)
            ), 6))
    end
{%- endmacro %}

{#
  One end of the 95 % interval of a share (Wilson 1927): `wins` of `count`, halves allowed; NULL where
  they are.
#}
{% macro wilson_interval(wins, count, side) -%}
    {%- set z = 1.959963984540054 -%}
    case
        when {{ count }} > 0 and {{ wins }} is not null then
            round(
                least(1, greatest(0, (
                    {{ wins }} / {{ count }} + {{ z * z / 2 }} / {{ count }}
                    {{ side }} {{ z }} * sqrt(
                        {{ wins }} / {{ count }} * (1 - {{ wins }} / {{ count }}) / {{ count }}
                        + {{ z * z / 4 }} / ({{ count }} * {{ count }})
                    )
                ) / (1 + {{ z * z }} / {{ count }}))),
                6
            )
    end
{%- endmacro %}
