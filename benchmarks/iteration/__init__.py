"""One full iteration of reinforcement learning, egspo against plain research code.

python -m benchmarks.iteration --help
"""
