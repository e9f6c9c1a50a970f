"""What reward costs: six algorithms on two small tasks, several seeds.

python -m benchmarks.algorithms --help
"""

from benchmarks.algorithms.results import read_all
from benchmarks.algorithms.tables import draw, section

__all__ = ["draw", "read_all", "section"]
