#include <algorithm>
#include <cstring>

#include "gisp/swap.h"

namespace gisp {
namespace {

template <typename T>
void exchange(char* a, char* b) {
  T x, y;
  std::memcpy(&x, a, sizeof(T));
  std::memcpy(&y, b, sizeof(T));
  std::memcpy(a, &y, sizeof(T));
  std::memcpy(b, &x, sizeof(T));
}

// Single elements are the rule for columns: a call of swap_ranges per element would cost more than the swap.
void exchange_run(char* a, char* b, std::int64_t bytes) {
  switch (bytes) {
    case 1:
      return exchange<std::uint8_t>(a, b);
    case 2:
      return exchange<std::uint16_t>(a, b);
    case 4:
      return exchange<std::uint32_t>(a, b);
    case 8:
      return exchange<std::uint64_t>(a, b);
    default:
      std::swap_ranges(a, a + bytes, b);
  }
}

}  // namespace

void swap_blocks_cpu(const void* table, std::int64_t tensors) {
  const auto* tasks = static_cast<const SwapTask*>(table);
  const auto* pairs = reinterpret_cast<const SwapPair*>(tasks + tensors);
  for (std::int64_t i = 0; i < tensors; ++i) {
    const SwapTask& task = tasks[i];
    if (task.run == 0) continue;
    for (std::int64_t row = 0; row < task.rows; ++row) {
      char* line = reinterpret_cast<char*>(task.address) + row * task.pitch;
      for (std::uint32_t p = 0; p < task.pairs; ++p) {
        const SwapPair pair = pairs[task.first_pair + p];
        exchange_run(line + pair.a * task.step, line + pair.b * task.step, task.run);
      }
    }
  }
}

}  // namespace gisp
