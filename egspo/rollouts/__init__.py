"""Trajectories: prompts denoised step by step."""
