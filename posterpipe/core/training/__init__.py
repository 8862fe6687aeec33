"""What a training is given, what it is due for, and which checkpoint comes of it.

What belongs here: the sets of images with a caption each, those to train on (`training_set`, in
shapes by `buckets`), those held out (`holdout_set`) and those of the class (`class_images`);
whether a training is due (`retraining`); and the checkpoint that the settings of now ask for
(`checkpoints`). What does not: the trainer itself, which works by hand as well (`dreambooth`).
"""
