#include <cuda_runtime.h>

#include <limits>
#include <sstream>
#include <stdexcept>

#include "gisp/check.h"
#include "gisp/swap.h"

namespace gisp {
namespace {

constexpr int kThreads = 256;

void check_cuda(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  std::ostringstream message;
  message << action << " failed: " << cudaGetErrorName(status) << ": " << cudaGetErrorString(status);
  throw std::runtime_error(message.str());
}

template <typename T>
__device__ __forceinline__ void exchange(char* a, char* b) {
  const T x = *reinterpret_cast<const T*>(a);
  const T y = *reinterpret_cast<const T*>(b);
  *reinterpret_cast<T*>(a) = y;
  *reinterpret_cast<T*>(b) = x;
}

__device__ __forceinline__ void exchange_bytes(char* a, char* b, unsigned bytes) {
  switch (bytes) {
    case 1:
      return exchange<unsigned char>(a, b);
    case 2:
      return exchange<unsigned short>(a, b);
    case 4:
      return exchange<unsigned int>(a, b);
    case 8:
      return exchange<uint2>(a, b);
    default:
      return exchange<uint4>(a, b);
  }
}

// Last task whose first chunk is not behind `chunk`. Tasks without work share their successor's first chunk and are
// never the last.
__device__ __forceinline__ int find_task(const SwapTask* tasks, int count, long long chunk) {
  int low = 0;
  int high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (tasks[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// One chunk of items per thread block. The thread that owns an item reads and writes both sides of its window, so no
// two threads touch the same byte and the result depends on no order. Consecutive threads take consecutive windows of a
// run; with runs of one element (columns) they take the pairs of one row, whose tail sides are neighbours in memory.
__global__ void __launch_bounds__(kThreads) swap_blocks_kernel(const SwapTask* tasks, int count) {
  const SwapPair* pairs = reinterpret_cast<const SwapPair*>(tasks + count);
  const SwapTask task = tasks[find_task(tasks, count, blockIdx.x)];
  const unsigned per_row = task.pairs * task.slots;
  const long long first = (static_cast<long long>(blockIdx.x) - task.first_chunk) * kChunkItems;
  const long long first_row = first / per_row;
  const unsigned first_rest = static_cast<unsigned>(first - first_row * per_row);
  for (unsigned i = threadIdx.x; i < kChunkItems; i += kThreads) {
    const unsigned in_rows = first_rest + i;
    const long long row = first_row + in_rows / per_row;
    if (row >= task.rows) return;
    const unsigned in_row = in_rows % per_row;
    const SwapPair pair = pairs[task.first_pair + in_row / task.slots];
    const unsigned slot = in_row % task.slots;

    const unsigned long long start = task.address + pair.a * task.step + row * task.pitch;
    const unsigned long long end = start + task.run;
    const unsigned long long window = (start & ~static_cast<unsigned long long>(task.window - 1)) +
                                      static_cast<unsigned long long>(slot) * task.window;
    const unsigned long long low = window > start ? window : start;
    const unsigned long long high = window + task.window < end ? window + task.window : end;
    if (low >= high) continue;
    const long long distance = (static_cast<long long>(pair.b) - pair.a) * task.step;
    char* a = reinterpret_cast<char*>(low);
    if (high - low == task.window) {
      exchange_bytes(a, a + distance, task.window);
    } else {
      for (unsigned long long done = 0; done < high - low; done += task.element_size) {
        exchange_bytes(a + done, a + distance + done, task.element_size);
      }
    }
  }
}

}  // namespace

void swap_blocks_cuda(const void* table, std::int64_t tensors, std::int64_t chunks, int device, void* stream) {
  if (chunks == 0) return;
  GISP_CHECK(tensors > 0 && tensors <= std::numeric_limits<int>::max(), "cannot swap in " << tensors << " tensors");
  GISP_CHECK(chunks <= std::numeric_limits<int>::max(), chunks << " chunks are more than one launch holds");
  check_cuda(cudaSetDevice(device), "selecting the device");
  // An error left behind by somebody else must not be reported as a failed launch of this kernel.
  cudaGetLastError();
  swap_blocks_kernel<<<static_cast<unsigned>(chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const SwapTask*>(table), static_cast<int>(tensors));
  check_cuda(cudaGetLastError(), "launching swap_blocks_kernel");
}

}  // namespace gisp
