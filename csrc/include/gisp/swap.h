// Batched in-place swaps of equally sized blocks, for many tensors at once.
//
// A block is `rows` runs of `run` contiguous elements, `pitch` elements apart; block s starts s * step elements into
// the tensor. Rows of a matrix, columns of a matrix and entries of a vector all have this form. A table of tasks and
// pairs in one piece of memory describes all swaps; it is planned on the host and executed there or, after one copy,
// by one kernel launch. Blocks of one tensor are disjoint and so are the pairs, so every byte has exactly one owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gisp {

// One tensor. Extents and distances are in elements, `count` is its number of blocks, `pairs` the number of swaps.
struct BlockLayout {
  std::uint64_t address;
  std::int64_t element_size;
  std::int64_t count;
  std::int64_t rows;
  std::int64_t run;
  std::int64_t pitch;
  std::int64_t step;
  std::int64_t pairs;
};

struct SwapPair {
  std::int32_t a;
  std::int32_t b;
};

// One tensor in the table; distances are in bytes. The items of a task are numbered with the slots of a run
// fastest, then the pairs, then the rows. A slot is an aligned window of `window` bytes; `slots` windows
// cover a run wherever it starts.
struct SwapTask {
  std::uint64_t address;
  std::int64_t pitch;
  std::int64_t step;
  std::int64_t run;
  std::int64_t rows;
  std::int64_t first_pair;
  std::int64_t first_chunk;
  std::uint32_t pairs;
  std::uint32_t slots;
  std::uint32_t window;
  std::uint32_t element_size;
};

// Items handled by one thread block.
constexpr std::int64_t kChunkItems = 1024;
// Widest access of one thread.
constexpr std::int64_t kMaxWindow = 16;

// Bytes of a table for this many tensors and pairs in total.
std::size_t swap_table_bytes(std::int64_t tensors, std::int64_t pairs);

// Fills `table` (swap_table_bytes long, 8-byte aligned) from the layouts and from `pairs`, the int64 (a, b) of all
// tensors in order. Returns the number of thread blocks the table needs. Throws std::invalid_argument.
std::int64_t plan_swaps(const std::vector<BlockLayout>& layouts, const std::int64_t* pairs, void* table);

// Executes a table whose addresses are host memory.
void swap_blocks_cpu(const void* table, std::int64_t tensors);

// Executes a table in device memory, whose addresses are memory of the same device: one launch on `stream`, no
// synchronisation. `device` becomes the current device. Throws std::runtime_error when the launch is refused.
void swap_blocks_cuda(const void* table, std::int64_t tensors, std::int64_t chunks, int device, void* stream);

}  // namespace gisp
