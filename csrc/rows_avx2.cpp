// Compiled with -mavx2 -mfma -mf16c, and run where the processor has them.
#if defined(__x86_64__)
#include "rows_loops.h"

constexpr egspo::RowLoops egspo::kAvx2Loops = row_loops("avx2");
#endif
