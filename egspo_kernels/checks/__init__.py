"""Checks of arguments: what the public functions do before any backend runs."""
