// For every processor of the platform: SSE2 on x86-64, NEON on AArch64.
#include "rows_loops.h"

constexpr egspo::RowLoops egspo::kBaselineLoops = row_loops("baseline");
