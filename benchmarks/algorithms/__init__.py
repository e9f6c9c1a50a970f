"""What reward costs: selections of steps and other methods on small tasks, several seeds.

python -m benchmarks.algorithms --help
"""

from benchmarks.algorithms.results import read_all
from benchmarks.algorithms.tables import draw, section

__all__ = ["draw", "read_all", "section"]
