"""One full iteration of reinforcement learning, egspo against plain research code.

python -m benchmarks.iteration --help
"""

from benchmarks.iteration.tables import section

__all__ = ["section"]
