// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512, and run where
// the processor has them.
#if defined(__x86_64__)
#include "rows_loops.h"

constexpr egspo::RowLoops egspo::kAvx512Loops = row_loops("avx512");
#endif
