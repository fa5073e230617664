"""Hand-written kernels behind the models. The model files have the same functions in plain torch."""
