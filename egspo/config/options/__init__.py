"""The options of a run: one tree of dataclasses, a file per section.

Defaults are EGSPO-SA's with exact on-policy numerics; ``algorithm.preset`` changes several at once.
Checks that need only the options are made here, before any model or data is loaded.
"""
