"""The compiled CPU kernels of ``csrc/rows.h``, for float32, float16 and bfloat16 rows.

One pass over the logits, in the threads of torch's own OpenMP runtime. The result of a row does not
depend on the number of rows or of threads.
"""
