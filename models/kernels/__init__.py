"""Hand-written kernels behind the models: what they compute is written in the model files too."""
