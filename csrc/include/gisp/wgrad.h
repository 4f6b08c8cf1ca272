// Tile sums of |W * (dY^T X)| for Hopper GPUs, without storing the weight gradient.
//
// The product has structures along its rows: by rows of W its left operand is dY and its right one X, by columns the
// other way round, with W read transposed. Tokens are the leading dimension of both. Several layers may read one
// right operand; their columns lie anywhere in the left one.
#pragma once

#include <cstdint>
#include <vector>

namespace gisp {

constexpr int kWgradMaxLayers = 4;
// A tile of the product: rows that belong to structures, and the extent that is summed.
constexpr int kWgradTileRows = 128;
constexpr int kWgradTileWidth = 256;

// One layer to score. `address` is W, `pitch` the distance of its rows in bytes; `rows` its structures' rows (its
// columns when scoring by columns), `start` its first column in the left operand.
struct WgradLayer {
  std::uint64_t address;
  std::int64_t pitch;
  std::int64_t rows;
  std::int64_t start;
};

// A row-major 16-bit operand [tokens, columns] whose rows are `pitch` bytes apart.
struct WgradOperand {
  std::uint64_t address;
  std::int64_t pitch;
  std::int64_t columns;
};

struct WgradProblem {
  WgradOperand left;
  WgradOperand right;
  std::int64_t tokens;
  std::vector<WgradLayer> layers;
  bool by_column;
  bool bfloat16;  // otherwise float16
};

// Writes the sum over each tile's width to `partials`, float32 [tiles along the width, rows of all layers], every
// element exactly once. Addresses and pitches are multiples of 16 bytes. At most `programs` thread blocks run, which
// shapes no result. Asynchronous on `stream`; allocates nothing.
void wgrad_sums_sm90(const WgradProblem& problem, float* partials, int programs, int device, void* stream);

}  // namespace gisp
