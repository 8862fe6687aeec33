{#
  What an image answers, beside its seed: the prompt in its wording, and the sampler. Differences are
  between images of one question, since suite and sampler may change before all models have drawn
  anew. When a negative prompt begins to act is a matter of the variant.
#}
{% macro question(prompt_key, settings) -%}
    hash(
        {{ prompt_key }},
        cast(json_merge_patch({{ settings }}, '{"negative_from": null}') as varchar)
    )
{%- endmacro %}

{#
  Whether a score counts: of titles, those of images that are lettered. Scores of images that are
  lettered no more stay from a time when they were.
#}
{% macro is_asked(metric_id, is_lettered) -%}
    (not starts_with({{ metric_id }}, 'title_') or {{ is_lettered }})
{%- endmacro %}
