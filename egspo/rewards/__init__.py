"""Reward functions called in the background, and what they gave."""
