"""What reward costs: six algorithms on two small tasks, several seeds.

python -m benchmarks.algorithms --help
"""

from benchmarks.algorithms.tables import section

__all__ = ["section"]
