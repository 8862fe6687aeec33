{#
  The 0.975 quantile of Student's t with `degrees` degrees of freedom: NULL below one, from a table
  up to 30, then by the expansion of Abramowitz & Stegun 26.7.5 (right to six digits from 31 on).
#}
{% macro t_quantile(degrees) -%}
    case
        when {{ degrees }} < 1 then null
        when {{ degrees }} <= 30 then [
            12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004,
            2.262157, 2.228139, 2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905,
            2.109816, 2.100922, 2.093024, 2.085963, 2.079614, 2.073873, 2.068658, 2.063899,
            2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272
        ][{{ degrees }}]
        else
            1.959964
            + 2.372271 / {{ degrees }}
            + 2.822500 / ({{ degrees }} * {{ degrees }})
            + 2.555853 / ({{ degrees }} * {{ degrees }} * {{ degrees }})
    end
{%- endmacro %}

{#
  One end of the 95 % interval of a mean over prompts: NULL with fewer than two prompts, which say
  nothing about others. `side` is '-' for the lower end and '+' for the upper.
#}
{% macro t_interval(mean, deviation, count, side) -%}
    round(
        {{ mean }} {{ side }} ({{ t_quantile("(" ~ count ~ " - 1)") }})
        * {{ deviation }} / sqrt({{ count }}),
        6
    )
{%- endmacro %}
