"""DreamBooth: fine-tuning Stable Diffusion 1.x and 2.x on posters with a caption each.

Ruiz et al. 2023 (arXiv:2208.12242) teach a diffusion model by training it further on a few images;
here every image brings its own caption, as in the thesis that posterpipe rebuilds.

What belongs here: a training set and a base model in, a finished model out. What does not: how
posters become a training set (`training_set`), how images are drawn (`sampler`), and anything of
Dagster.

Read `train` from top to bottom; it leans on small modules:

- `config`: the settings and paths of one run, and the id of its checkpoint. Imports no torch.
- `effects`: which settings have an effect beside the others. Imports no torch either.
- `base_model`: the parts of the base model.
- `data`: a training set on disk.
- `latents`, `texts`: images and captions as the U-Net reads them, computed once (`cache`).
- `draws`: every random number as a function of its position, pure functions.
- `objective`: noising, targets and loss weights, pure functions.
- `batches`: from positions to what goes through the U-Net.
- `schedule`: the learning rate, a pure function.
- `continuing`: going on from another run's save with other settings.
- `learner`: the models in training; `cuda_graphs`: a step recorded on a GPU and replayed.
- `optimizers`, `adamw_8bit`, `lora`: what moves the weights, and which.
- `run`: what a run does between its steps, and when each thing is due.
- `running_loss`: the training loss, and when a run has diverged.
- `holdout`, `samples`: watching the model while it learns; `early_stop`: its best weights.
- `saves`: crash-safe saves from which a run goes on exactly; `pace`: how often.
- `guards`, `memory`: the lock, the signal to stop, memory that runs out.
- `reports`: what a run logs and records, and its curves.
- `checkpoint`, `card`: the finished diffusers directory, and its description.
- `launch`: the command line that runs it in a process of its own.

By hand: `python -m posterpipe.core.dreambooth --config run.toml`, or the same under
`accelerate launch -m`.
"""
