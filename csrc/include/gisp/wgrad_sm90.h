// Device side of wgrad.h: a persistent kernel that multiplies, meets W and sums. Included by wgrad_sm90.cu alone.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gisp/sm90.h"
#include "gisp/wgrad.h"

namespace gisp {
namespace {

// Boxes are 64 elements wide: one swizzled line of 128 bytes.
constexpr int kBoxColumns = 64;
constexpr int kTokens = 64;  // per step
constexpr int kSteps = 4;    // products of 16 tokens per step
constexpr int kStages = 3;   // steps in shared memory
constexpr int kConsumers = 2;
constexpr int kRows = kWgradTileRows / kConsumers;  // of the tile, per consumer
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kElementBytes = 2;

constexpr int kBoxBytes = kTokens * kBoxColumns * kElementBytes;
constexpr int kLeftBytes = kWgradTileRows * kTokens * kElementBytes;
constexpr int kStageBytes = (kWgradTileRows + kWgradTileWidth) * kTokens * kElementBytes;
constexpr int kWeightBytes = kRows * kWgradTileWidth * kElementBytes;
constexpr int kWeightBoxRows = 64;  // by rows; by columns one box holds the tile's whole width
constexpr int kWeightBoxBytes = kWeightBoxRows * kBoxColumns * kElementBytes;
constexpr int kBarriers = 2 * (kStages + kConsumers);
constexpr int kAlignment = 1024;  // of swizzled boxes
constexpr int kSharedBytes = kStages * kStageBytes + kConsumers * kWeightBytes + kBarriers * 8 + kAlignment;
// Tiles are walked in groups of that many along the rows, so that what runs at one time shares operands in the cache.
constexpr int kGroup = 8;
// The second consumer starts that many steps late: while one sums its tile, the other keeps the tensor cores busy.
constexpr int kLag = 1;

constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

struct Layer {
  int first_tile;
  int first_sum;
  int rows;
  int start;
};

struct Params {
  CUtensorMap left;
  CUtensorMap right;
  CUtensorMap weights[kWgradMaxLayers];
  Layer layers[kWgradMaxLayers];
  float* partials;
  int layer_count;
  int sums;  // rows of all layers
  int width;
  int steps;
  int tiles_m;
  int tiles_n;
};

struct Place {
  int layer;
  int row;     // within the layer
  int column;  // within the width
  int strip;   // tile along the width
};

__device__ __forceinline__ Place locate(const Params& p, int tile) {
  const int per_group = kGroup * p.tiles_n;
  const int first = tile / per_group * kGroup;
  const int rest = tile % per_group;
  const int group = min(p.tiles_m - first, kGroup);
  const int tile_m = first + rest % group;
  Place place;
  place.layer = 0;
  while (place.layer + 1 < p.layer_count && tile_m >= p.layers[place.layer + 1].first_tile) ++place.layer;
  place.row = (tile_m - p.layers[place.layer].first_tile) * kWgradTileRows;
  place.strip = rest / group;
  place.column = place.strip * kWgradTileWidth;
  return place;
}

// Position in a ring of buffers; the parity tells one round from the next.
template <int kSize>
struct Ring {
  int slot = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSize) {
      slot = 0;
      parity ^= 1;
    }
  }
};

struct Shared {
  std::uint32_t stages;
  std::uint32_t weights;
  std::uint32_t barriers;
  __device__ std::uint32_t left(int slot) const { return stages + slot * kStageBytes; }
  __device__ std::uint32_t right(int slot) const { return left(slot) + kLeftBytes; }
  __device__ std::uint32_t weight(int consumer) const { return weights + consumer * kWeightBytes; }
  __device__ std::uint32_t full(int slot) const { return barriers + 8 * slot; }
  __device__ std::uint32_t empty(int slot) const { return full(kStages + slot); }
  __device__ std::uint32_t weight_full(int consumer) const { return full(2 * kStages + consumer); }
  __device__ std::uint32_t weight_empty(int consumer) const { return full(2 * kStages + kConsumers + consumer); }
};

__device__ void load_operands(const Params& p, const Shared& shared) {
  Ring<kStages> ring;
  for (int tile = blockIdx.x; tile < p.tiles_m * p.tiles_n; tile += gridDim.x) {
    const Place place = locate(p, tile);
    const int left = p.layers[place.layer].start + place.row;
    for (int step = 0; step < p.steps; ++step) {
      const std::uint32_t full = shared.full(ring.slot);
      sm90::barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
      sm90::barrier_expect(full, kStageBytes);
#pragma unroll
      for (int box = 0; box < kWgradTileRows / kBoxColumns; ++box) {
        sm90::copy_box(shared.left(ring.slot) + box * kBoxBytes, &p.left, left + box * kBoxColumns, step * kTokens,
                       full);
      }
#pragma unroll
      for (int box = 0; box < kWgradTileWidth / kBoxColumns; ++box) {
        sm90::copy_box(shared.right(ring.slot) + box * kBoxBytes, &p.right, place.column + box * kBoxColumns,
                       step * kTokens, full);
      }
      ring.advance();
    }
  }
}

template <bool kTransposed>
__device__ void load_weights(const Params& p, const Shared& shared) {
  std::uint32_t parity = 0;
  for (int tile = blockIdx.x; tile < p.tiles_m * p.tiles_n; tile += gridDim.x, parity ^= 1) {
    const Place place = locate(p, tile);
    const CUtensorMap* map = &p.weights[place.layer];
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      const int row = place.row + consumer * kRows;
      sm90::barrier_wait(shared.weight_empty(consumer), parity ^ 1);
      sm90::barrier_expect(shared.weight_full(consumer), kWeightBytes);
      if constexpr (kTransposed) {
        sm90::copy_box(shared.weight(consumer), map, row, place.column, shared.weight_full(consumer));
      } else {
#pragma unroll
        for (int box = 0; box < kWgradTileWidth / kBoxColumns; ++box) {
          sm90::copy_box(shared.weight(consumer) + box * kWeightBoxBytes, map, place.column + box * kBoxColumns, row,
                         shared.weight_full(consumer));
        }
      }
    }
  }
}

// Address that this lane passes to load two 8 x 8 fragments (rows r, r + 8) of columns 8 j .. 8 j + 15.
template <bool kTransposed>
__device__ __forceinline__ std::uint32_t fragment_address(std::uint32_t weight, int j) {
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int in_matrix = lane % 8;
  const int lower = lane / 8 % 2;
  const int group = j + lane / 16;
  if constexpr (kTransposed) {
    return weight + (8 * group + in_matrix) * 128 + ((2 * warp + lower) ^ in_matrix) * 16;
  } else {
    return weight + group / 8 * kWeightBoxBytes + (16 * warp + 8 * lower + in_matrix) * 128 +
           (group % 8 ^ in_matrix) * 16;
  }
}

// Sums |W * G| along this thread's two rows. Columns from `valid` on are outside the matrix: an infinite operand may
// have met a zero there.
template <typename Element, bool kTransposed, bool kEdge>
__device__ __forceinline__ float2 sum_rows(const float (&gradient)[128], std::uint32_t weight, int valid) {
  float upper = 0.0f;
  float lower = 0.0f;
  const int own = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kWgradTileWidth / 8; j += 2) {
    std::uint32_t fragments[4];
    sm90::load_fragments<kTransposed>(fragments, fragment_address<kTransposed>(weight, j));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* g = gradient + 4 * (j + half);
      const float2 a = sm90::unpack<Element>(fragments[2 * half]);
      const float2 b = sm90::unpack<Element>(fragments[2 * half + 1]);
      const bool first = !kEdge || 8 * (j + half) + own < valid;
      const bool second = !kEdge || 8 * (j + half) + own + 1 < valid;
      upper += first ? fabsf(a.x * g[0]) : 0.0f;
      lower += first ? fabsf(b.x * g[2]) : 0.0f;
      upper += second ? fabsf(a.y * g[1]) : 0.0f;
      lower += second ? fabsf(b.y * g[3]) : 0.0f;
    }
  }
  return {upper, lower};
}

template <typename Element, bool kTransposed>
__device__ void consume(const Params& p, const Shared& shared, int consumer) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 % 4;
  Ring<kStages> ring;
  std::uint32_t weight_parity = 0;
  bool first_tile = true;
  for (int tile = blockIdx.x; tile < p.tiles_m * p.tiles_n; tile += gridDim.x) {
    const Place place = locate(p, tile);
    float gradient[128];
    if (first_tile && consumer == 1) asm volatile("bar.sync 1, 256;" ::: "memory");
    int previous = 0;
    for (int step = 0; step < p.steps; ++step) {
      sm90::barrier_wait(shared.full(ring.slot), ring.parity);
      const std::uint64_t left = sm90::operand(shared.left(ring.slot) + consumer * kBoxBytes, kBoxBytes);
      const std::uint64_t right = sm90::operand(shared.right(ring.slot), kBoxBytes);
      sm90::products_begin();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        // 16 tokens on: 2048 bytes, counted in sixteens.
        sm90::multiply<Element>(gradient, left + k * 128, right + k * 128, step > 0 || k > 0);
      }
      sm90::products_commit();
      sm90::products_wait<1>();
      if (step > 0 && lane == 0) sm90::barrier_arrive(shared.empty(previous));
      if (first_tile && consumer == 0 && step + 1 == min(kLag, p.steps)) {
        asm volatile("bar.arrive 1, 256;" ::: "memory");
      }
      previous = ring.slot;
      ring.advance();
    }
    sm90::products_wait<0>();
    sm90::pin(gradient);
    if (lane == 0) sm90::barrier_arrive(shared.empty(previous));
    first_tile = false;

    sm90::barrier_wait(shared.weight_full(consumer), weight_parity);
    weight_parity ^= 1;
    const int valid = p.width - place.column;
    float2 sums;
    if (valid >= kWgradTileWidth) {
      sums = sum_rows<Element, kTransposed, false>(gradient, shared.weight(consumer), valid);
    } else {
      sums = sum_rows<Element, kTransposed, true>(gradient, shared.weight(consumer), valid);
    }
    __syncwarp();
    if (lane == 0) sm90::barrier_arrive(shared.weight_empty(consumer));
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
      sums.x += __shfl_xor_sync(0xFFFFFFFFu, sums.x, other);
      sums.y += __shfl_xor_sync(0xFFFFFFFFu, sums.y, other);
    }
    const Layer& layer = p.layers[place.layer];
    const int row = place.row + consumer * kRows + warp * 16 + lane / 4;
    float* target = p.partials + static_cast<long long>(place.strip) * p.sums + layer.first_sum + row;
    if (lane % 4 == 0) {
      if (row < layer.rows) target[0] = sums.x;
      if (row + 8 < layer.rows) target[8] = sums.y;
    }
  }
}

// A warpgroup whose first two warps feed shared memory, and two that multiply and sum half a tile each.
template <typename Element, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1) wgrad_kernel(const __grid_constant__ Params p) {
  extern __shared__ char memory[];
  Shared shared;
  shared.stages = (sm90::shared_address(memory) + kAlignment - 1) / kAlignment * kAlignment;
  shared.weights = shared.stages + kStages * kStageBytes;
  shared.barriers = shared.weights + kConsumers * kWeightBytes;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kStages; ++slot) {
      sm90::barrier_init(shared.full(slot), 1);
      sm90::barrier_init(shared.empty(slot), 4 * kConsumers);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      sm90::barrier_init(shared.weight_full(consumer), 1);
      sm90::barrier_init(shared.weight_empty(consumer), 4);
    }
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    sm90::give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) load_operands(p, shared);
    if (threadIdx.x == 32) load_weights<kTransposed>(p, shared);
  } else {
    sm90::take_registers<kConsumerRegisters>();
    consume<Element, kTransposed>(p, shared, threadIdx.x / 128 - 1);
  }
}

}  // namespace
}  // namespace gisp
