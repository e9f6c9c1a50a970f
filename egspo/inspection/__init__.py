"""Trajectories to look at: in a terminal, as a page, as a figure."""
