"""A training run from recipe to final model."""
