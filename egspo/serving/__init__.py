"""Completions of a trained model, and their likelihoods."""
