{#
  Whether a score counts: of titles, those of images that are lettered. Scores of images that are
  lettered no more stay from a time when they were.
#}
{% macro is_asked(metric_id, is_lettered) -%}
    (not starts_with({{ metric_id }}, 'title_') or {{ is_lettered }})
{%- endmacro %}
