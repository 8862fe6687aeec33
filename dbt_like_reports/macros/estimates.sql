{#
  A quantile of Student's t with `degrees` degrees of freedom, for `detectable_difference`: 0.975
  (both ends of a 95 % interval) or 0.8 (the power): NULL below one, from a table up to 30,
  then by the expansion of Abramowitz & Stegun 26.7.5 (right to six digits from 31 on).
#}
{% macro t_quantile(degrees, probability=0.975) -%}
    {%- set tables = {
        0.975: [
            12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004,
            2.262157, 2.228139, 2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905,
            2.109816, 2.100922, 2.093024, 2.085963, 2.079614, 2.073873, 2.068658, 2.063899,
            2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272
        ],
        0.8: [
            1.376382, 1.060660, 0.978472, 0.940965, 0.919544, 0.905703, 0.896030, 0.888890,
            0.883404, 0.879058, 0.875530, 0.872609, 0.870152, 0.868055, 0.866245, 0.864667,
            0.863279, 0.862049, 0.860951, 0.859964, 0.859074, 0.858266, 0.857530, 0.856855,
            0.856236, 0.855665, 0.855137, 0.854647, 0.854192, 0.853767
        ]
    } -%}
    {%- set expansions = {
        0.975: [1.959964, 2.372271, 2.822500, 2.555853],
        0.8: [0.841621, 0.359441, 0.147651, 0.016746]
    } -%}
    {%- set expansion = expansions[probability] -%}
    case
        when {{ degrees }} < 1 then null
        when {{ degrees }} <= 30 then {{ tables[probability] }}[{{ degrees }}]
        else
            {{ expansion[0] }}
            + {{ expansion[1] }} / {{ degrees }}
            + {{ expansion[2] }} / ({{ degrees }} * {{ degrees }})
            + {{ expansion[3] }} / ({{ degrees }} * {{ degrees }} * {{ degrees }})
    end
{%- endmacro %}

{#
  A deviation of values that are the same but for their last digits. Then prompts say nothing about
  how others would vary: no interval, and no detectable difference.
#}
{% macro no_spread() -%} 1e-9 {%- endmacro %}

{#
  An end of an interval of a metric, which does not leave the metric's range: a share or a distance
  of titles, and a rank among texts, lie between 0 and 1. (greatest() and least() pass over NULL,
  which has to stay.)
#}
{% macro within_range(value, metric_id) -%}
    case
        when
            {{ value }} is not null
            and regexp_matches({{ metric_id }}, '^(title_|clip_rank[.])')
        then
            round(least(1, greatest(0, {{ value }})), 6)
        else round({{ value }}, 6)
    end
{%- endmacro %}

{#
  Two-sided p-value of no mean difference over prompts by Student's t: the distribution has a closed
  form for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4). Where all prompts differ
  by the same, there is no t; then that of their signs, which chance gives all alike 2 times of 2^n.
  NULL with fewer than two prompts.
#}
{% macro t_p_value(mean, deviation, count) -%}
    {%- set degrees = "(" ~ count ~ " - 1)" -%}
    {%- set t_squared = "(" ~ mean ~ " * " ~ mean ~ " * " ~ count ~ " / (" ~ deviation ~ " * " ~ deviation ~ "))" -%}
    {%- set sine = "sqrt(" ~ t_squared ~ " / (" ~ degrees ~ " + " ~ t_squared ~ "))" -%}
    {%- set cosine_squared = "(" ~ degrees ~ " / (" ~ degrees ~ " + " ~ t_squared ~ "))" -%}
    case
        when {{ count }} < 2 then null
        when {{ deviation }} <= {{ no_spread() }} and abs({{ mean }}) <= {{ no_spread() }} then 1
        when {{ deviation }} <= {{ no_spread() }} then pow(2.0, 1 - {{ count }})
        when {{ mean }} = 0 then 1
        when {{ degrees }} % 2 = 0 then
            round(1 - {{ sine }} * list_sum([
                exp(lgamma(k + 0.5) - lgamma(k + 1)) / sqrt(pi()) * pow({{ cosine_squared }}, k)
                for k in range(0, {{ degrees }} // 2)
            ]), 6)
        else
            round(1 - 2 / pi() * (
                asin({{ sine }})
                + {{ sine }} * sqrt({{ cosine_squared }}) * coalesce(list_sum([
                    exp(lgamma(k + 1) - lgamma(k + 1.5)) * sqrt(pi()) / 2
                    * pow({{ cosine_squared }}, k)
                    for k in range(0, {{ degrees }} // 2)
                ]), 0)
            ), 6)
    end
{%- endmacro %}

{# One end of the 95 % interval of a share (Wilson 1927): `wins` of `count`, halves allowed. #}
{% macro wilson_interval(wins, count, side) -%}
    {%- set z = 1.959963984540054 -%}
    case
        when {{ count }} > 0 then
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
