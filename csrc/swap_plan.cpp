#include <algorithm>
#include <limits>

#include "gisp/check.h"
#include "gisp/swap.h"

namespace gisp {
namespace {

// Widest power of two that keeps both sides of every swap equally aligned: blocks are a multiple of `step` apart.
std::int64_t choose_window(std::int64_t step, std::int64_t run, std::int64_t element_size) {
  std::int64_t window = kMaxWindow;
  while (window > element_size && (step % window != 0 || window > run)) window /= 2;
  return window;
}

// Windows that cover a run of every row. Unless all rows start on a window, the worst start is one element past it.
std::int64_t count_slots(const SwapTask& task) {
  const std::int64_t window = task.window;
  const bool aligned =
      task.address % static_cast<std::uint64_t>(window) == 0 && (task.rows == 1 || task.pitch % window == 0);
  const std::int64_t lead = aligned ? 0 : window - task.element_size;
  return (lead + task.run + window - 1) / window;
}

void check_layout(const BlockLayout& layout, std::size_t index) {
  const std::int64_t size = layout.element_size;
  GISP_CHECK(size == 1 || size == 2 || size == 4 || size == 8,
             "tensor " << index << ": element size must be 1, 2, 4 or 8 bytes, got " << size);
  GISP_CHECK(layout.address % static_cast<std::uint64_t>(size) == 0,
             "tensor " << index << ": address " << layout.address << " is not a multiple of " << size);
  GISP_CHECK(layout.rows >= 0 && layout.run >= 0 && layout.pairs >= 0 && layout.step >= 0 && layout.pitch >= 0,
             "tensor " << index << ": negative extent (rows " << layout.rows << ", run " << layout.run << ", pitch "
                       << layout.pitch << ", step " << layout.step << ", pairs " << layout.pairs << ")");
  GISP_CHECK(layout.count <= std::numeric_limits<std::int32_t>::max(),
             "tensor " << index << ": " << layout.count << " blocks are more than 2^31 - 1");
}

SwapPair checked_pair(const std::int64_t* pair, const BlockLayout& layout, std::size_t index) {
  GISP_CHECK(pair[0] >= 0 && pair[0] < layout.count && pair[1] >= 0 && pair[1] < layout.count,
             "tensor " << index << ": pair (" << pair[0] << ", " << pair[1] << ") is outside its " << layout.count
                       << " blocks");
  return {static_cast<std::int32_t>(pair[0]), static_cast<std::int32_t>(pair[1])};
}

}  // namespace

std::size_t swap_table_bytes(std::int64_t tensors, std::int64_t pairs) {
  GISP_CHECK(tensors >= 0 && pairs >= 0, "negative table size: " << tensors << " tensors, " << pairs << " pairs");
  return static_cast<std::size_t>(tensors) * sizeof(SwapTask) + static_cast<std::size_t>(pairs) * sizeof(SwapPair);
}

std::int64_t plan_swaps(const std::vector<BlockLayout>& layouts, const std::int64_t* pairs, void* table) {
  auto* tasks = static_cast<SwapTask*>(table);
  auto* table_pairs = reinterpret_cast<SwapPair*>(tasks + layouts.size());
  std::int64_t next_pair = 0;
  std::int64_t next_chunk = 0;
  for (std::size_t i = 0; i < layouts.size(); ++i) {
    const BlockLayout& layout = layouts[i];
    check_layout(layout, i);
    SwapTask task{};
    task.address = layout.address;
    task.pitch = layout.pitch * layout.element_size;
    task.step = layout.step * layout.element_size;
    task.run = layout.run * layout.element_size;
    task.rows = layout.rows;
    task.first_pair = next_pair;
    task.first_chunk = next_chunk;
    task.element_size = static_cast<std::uint32_t>(layout.element_size);
    task.window = static_cast<std::uint32_t>(choose_window(task.step, task.run, layout.element_size));
    task.pairs = static_cast<std::uint32_t>(layout.pairs);
    const std::int64_t slots = count_slots(task);
    const std::int64_t items_per_row = slots * layout.pairs;
    GISP_CHECK(
        slots <= std::numeric_limits<std::int32_t>::max() && items_per_row <= std::numeric_limits<std::int32_t>::max(),
        "tensor " << i << ": " << layout.pairs << " swaps of " << task.run << " bytes are too many for one call");
    task.slots = static_cast<std::uint32_t>(slots);
    next_chunk += (items_per_row * task.rows + kChunkItems - 1) / kChunkItems;
    for (std::int64_t p = 0; p < layout.pairs; ++p, ++next_pair) {
      table_pairs[next_pair] = checked_pair(pairs + 2 * next_pair, layout, i);
    }
    tasks[i] = task;
  }
  return next_chunk;
}

}  // namespace gisp
