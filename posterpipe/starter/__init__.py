"""Small models of the real architectures, and the drawn world they are trained on."""
