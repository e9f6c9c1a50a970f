"""Objectives: what of a trajectory is scored, and the loss that the optimizer gets."""
