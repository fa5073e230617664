"""From raw files to canonical data that passed validation."""
