"""From a training set to checkpoints."""
