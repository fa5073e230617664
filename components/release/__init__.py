"""From checkpoints to a version that may serve: evaluate, gate, package, smoke, promote."""
