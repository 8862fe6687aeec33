"""posterpipe: movie posters in; a fine-tuned Stable Diffusion and the evidence on it out.

What belongs here: nothing but the rooms. `definitions` is what Dagster loads, `defs` the Dagster
layer, `core` what the assets do, `studio` the page for designers, `starter` how the starter models
are made, `cli` the console command, `commands` what it does, `settings` every setting, `profiles`
values of them. What does not: code, since whatever stood here would run at every import.
"""
