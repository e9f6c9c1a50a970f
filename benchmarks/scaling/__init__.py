"""How the cost of an iteration grows with its sizes.

python -m benchmarks.scaling --help
"""

from benchmarks.scaling.tables import section

__all__ = ["section"]
