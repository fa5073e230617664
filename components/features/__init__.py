"""From canonical data to item vectors, Feast's stores and the training set."""
