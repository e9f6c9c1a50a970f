"""How much of the full-step gradient a selection of steps keeps, on three small tasks.

python -m benchmarks.gradients --help
"""

from benchmarks.gradients.tables import draw, read_all, section

__all__ = ["draw", "read_all", "section"]
