"""DreamBooth: fine-tuning Stable Diffusion 1.x and 2.x on posters with a caption each.

Ruiz et al. 2023 (arXiv:2208.12242) teach a diffusion model by training it further on a few images;
here every image brings its own caption, as in the study that posterpipe rebuilds.

Read `train` from top to bottom; it leans on small modules:

- `config`: what one run is told, and the id of what it makes. Imports no torch.
- `data`: the training set, cached latents, and every random number as a function of its position.
- `objective`: noising, targets and loss weights, pure functions.
- `schedule`: the learning rate, a pure function.
- `saves`: crash-safe saves from which a run goes on exactly.
- `checkpoint`: reading the base model, writing the finished diffusers directory.
- `reports`: what a run says while it works, and its curves.
- `launch`: the command line that runs it in a process of its own.

By hand: `python -m posterpipe.core.dreambooth --config run.toml`, or the same under
`accelerate launch -m`.

What does not belong here: how posters become a training set (`training_set`), how images are drawn
(`sampler`), and anything of Dagster.
"""
