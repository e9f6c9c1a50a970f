"""Triton kernels, for GPUs and for Triton's interpreter; imported only once they are chosen.

Every kernel reduces a row in two levels. The columns are cut into blocks of a constant size, one
program each; a second kernel combines the blocks of a row in a fixed order. The cut depends on the
vocabulary alone, so the result of a row is bitwise independent of the batch it is in.
"""
