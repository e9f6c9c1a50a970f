// Work items shared out among threads.
#ifndef EGSPO_ROWS_PARALLEL_H_
#define EGSPO_ROWS_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "rows.h"

namespace egspo {

// Fewer logits than this are not worth waking a thread.
constexpr int64_t kLeastWork = 65536;

// body(first, last) of ranges that together are [0, count), `grain` items or fewer at a time, each
// in some thread. The order is not defined.
template <typename Body>
void share_out(const egspo_rows& rows, int64_t count, int64_t grain, int64_t work,
               const Body& body) {
  struct Shared {
    const Body& body;
    int64_t count, grain;
    std::atomic<int64_t> next{0};
  } shared{body, count, grain};
  const auto take = [](void* data) {
    Shared& all = *static_cast<Shared*>(data);
    for (;;) {
      const int64_t first = all.next.fetch_add(all.grain, std::memory_order_relaxed);
      if (first >= all.count) return;
      all.body(first, first + all.grain < all.count ? first + all.grain : all.count);
    }
  };
  if (rows.threads <= 1 || count <= grain || work < kLeastWork) {
    take(&shared);
  } else if (rows.parallel != nullptr) {
    rows.parallel(take, &shared, static_cast<unsigned>(rows.threads), 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (int64_t i = 1; i < rows.threads; ++i) others.emplace_back(take, &shared);
    } catch (const std::system_error&) {
      // As many as there are do it all.
    }
    take(&shared);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace egspo

#endif  // EGSPO_ROWS_PARALLEL_H_
