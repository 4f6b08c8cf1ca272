// Plans and CPU swaps of the core against a plain loop, without Python.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "gisp/swap.h"

namespace {

using gisp::BlockLayout;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::exit(1);
}

std::vector<std::uint64_t> make_table(const std::vector<BlockLayout>& layouts, const std::vector<std::int64_t>& pairs,
                                      std::int64_t* chunks) {
  const std::size_t bytes =
      gisp::swap_table_bytes(static_cast<std::int64_t>(layouts.size()), static_cast<std::int64_t>(pairs.size() / 2));
  std::vector<std::uint64_t> table((bytes + 7) / 8);
  *chunks = gisp::plan_swaps(layouts, pairs.data(), table.data());
  return table;
}

template <typename T>
void swaps_columns(std::int64_t height, std::int64_t width, std::int64_t pitch, std::int64_t block) {
  std::vector<T> matrix(static_cast<std::size_t>(height * pitch));
  for (std::size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<T>(i * 7 + 1);
  std::vector<T> expected = matrix;
  const std::vector<std::int64_t> pairs = {0, width / block - 1, 1, 2};
  for (std::size_t p = 0; p < pairs.size(); p += 2) {
    for (std::int64_t row = 0; row < height; ++row) {
      for (std::int64_t j = 0; j < block; ++j) {
        std::swap(expected[static_cast<std::size_t>(row * pitch + pairs[p] * block + j)],
                  expected[static_cast<std::size_t>(row * pitch + pairs[p + 1] * block + j)]);
      }
    }
  }
  const auto address = reinterpret_cast<std::uint64_t>(matrix.data());
  const BlockLayout columns = {address, sizeof(T), width / block, height, block, pitch, block, 2};
  std::int64_t chunks = 0;
  const auto table = make_table({columns}, pairs, &chunks);
  gisp::swap_blocks_cpu(table.data(), 1);
  require(matrix == expected, "columns trade places and padding stays");
  require(chunks >= 1, "work needs a chunk");
  gisp::swap_blocks_cpu(table.data(), 1);
  for (std::size_t i = 0; i < matrix.size(); ++i) require(matrix[i] == static_cast<T>(i * 7 + 1), "twice is identity");
}

void plans_aligned_windows() {
  alignas(16) static std::uint16_t storage[4096];
  const auto address = reinterpret_cast<std::uint64_t>(storage);
  std::int64_t chunks = 0;
  const auto plan = [&](const BlockLayout& layout) {
    const auto table = make_table({layout}, {0, 1}, &chunks);
    gisp::SwapTask task;
    std::memcpy(&task, table.data(), sizeof(task));
    return task;
  };
  gisp::SwapTask task = plan({address, 2, 4, 1, 64, 64, 64, 1});
  require(task.window == 16 && task.slots == 8, "aligned rows use 16-byte windows");
  task = plan({address + 2, 2, 4, 1, 64, 64, 64, 1});
  require(task.window == 16 && task.slots == 9, "a misaligned start needs one more window");
  task = plan({address, 2, 4, 1, 63, 63, 63, 1});
  require(task.window == 2 && task.slots == 63, "odd distances allow single elements only");
  task = plan({address, 2, 64, 8, 1, 64, 1, 1});
  require(task.window == 2 && task.slots == 1, "a column is one element per row");
}

void rejects(const BlockLayout& layout, const std::vector<std::int64_t>& pairs, const char* what) {
  try {
    std::int64_t chunks = 0;
    make_table({layout}, pairs, &chunks);
  } catch (const std::invalid_argument&) {
    return;
  }
  require(false, what);
}

}  // namespace

int main() {
  swaps_columns<std::uint8_t>(5, 12, 13, 3);
  swaps_columns<std::uint16_t>(7, 9, 9, 1);
  swaps_columns<std::uint32_t>(3, 32, 40, 8);
  swaps_columns<std::uint64_t>(4, 20, 21, 5);
  plans_aligned_windows();
  rejects({0, 3, 4, 1, 8, 8, 8, 1}, {0, 1}, "an element of 3 bytes is refused");
  rejects({1, 2, 4, 1, 8, 8, 8, 1}, {0, 1}, "a misaligned address is refused");
  rejects({0, 2, 4, 1, 8, 8, 8, 1}, {0, 4}, "a pair outside the tensor is refused");
  rejects({0, 2, 4, 1, 8, 8, 8, 1}, {-1, 2}, "a negative pair is refused");
  std::puts("ok");
  return 0;
}
