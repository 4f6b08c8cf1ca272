#include "gisp/wgrad_sm90.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "gisp/check.h"
#include "gisp/wgrad.h"

namespace gisp {
namespace {

void check_cuda(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  std::ostringstream message;
  message << action << " failed: " << cudaGetErrorName(status) << ": " << cudaGetErrorString(status);
  throw std::runtime_error(message.str());
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// Looked up at run time: the module must load without a driver.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
             "looking up cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<Encode>(function);
}

CUtensorMap encode(const char* name, bool bfloat16, std::uint64_t address, std::int64_t rows, std::int64_t columns,
                   std::int64_t pitch, int box_rows) {
  static const Encode function = find_encode();
  GISP_CHECK(address % 16 == 0 && pitch % 16 == 0,
             name << ": address " << address << " and pitch " << pitch << " must be multiples of 16 bytes");
  GISP_CHECK(rows > 0 && columns > 0 && rows <= std::numeric_limits<int>::max() &&
                 columns <= std::numeric_limits<int>::max(),
             name << ": a matrix of " << rows << " by " << columns << " cannot be copied by boxes");
  CUtensorMap map;
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[] = {1, 1};
  const CUresult status = function(
      &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      reinterpret_cast<void*>(address), extents, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  GISP_CHECK(status == CUDA_SUCCESS, name << ": a matrix of " << rows << " by " << columns << ", rows " << pitch
                                          << " bytes apart, cannot be copied by boxes (driver error " << status << ")");
  return map;
}

int tiles(std::int64_t extent, int tile) { return static_cast<int>((extent + tile - 1) / tile); }

template <typename Element, bool kTransposed>
void launch(const Params& params, int programs, cudaStream_t stream) {
  const auto kernel = wgrad_kernel<Element, kTransposed>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "reserving shared memory");
  kernel<<<static_cast<unsigned>(programs), kThreads, kSharedBytes, stream>>>(params);
}

}  // namespace

void wgrad_sums_sm90(const WgradProblem& problem, float* partials, int programs, int device, void* stream) {
  const std::size_t count = problem.layers.size();
  GISP_CHECK(count > 0 && count <= kWgradMaxLayers, "cannot score " << count << " layers in one launch");
  GISP_CHECK(programs > 0, "cannot run " << programs << " thread blocks");
  check_cuda(cudaSetDevice(device), "selecting the device");
  Params params = {};
  params.left = encode("left operand", problem.bfloat16, problem.left.address, problem.tokens, problem.left.columns,
                       problem.left.pitch, kTokens);
  params.right = encode("right operand", problem.bfloat16, problem.right.address, problem.tokens,
                        problem.right.columns, problem.right.pitch, kTokens);
  params.width = static_cast<int>(problem.right.columns);
  std::int64_t sums = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const WgradLayer& layer = problem.layers[i];
    GISP_CHECK(layer.start >= 0 && layer.start + layer.rows <= problem.left.columns,
               "layer " << i << ": columns " << layer.start << " to " << layer.start + layer.rows
                        << " are not in the left operand of " << problem.left.columns);
    params.weights[i] = problem.by_column ? encode("weight", problem.bfloat16, layer.address, params.width, layer.rows,
                                                   layer.pitch, kWgradTileWidth)
                                          : encode("weight", problem.bfloat16, layer.address, layer.rows, params.width,
                                                   layer.pitch, kWeightBoxRows);
    params.layers[i] = {params.tiles_m, static_cast<int>(sums), static_cast<int>(layer.rows),
                        static_cast<int>(layer.start)};
    params.tiles_m += tiles(layer.rows, kWgradTileRows);
    sums += layer.rows;
  }
  params.partials = partials;
  params.layer_count = static_cast<int>(count);
  params.sums = static_cast<int>(sums);
  params.steps = tiles(problem.tokens, kTokens);
  params.tiles_n = tiles(params.width, kWgradTileWidth);
  GISP_CHECK(static_cast<std::int64_t>(params.tiles_m) * params.tiles_n <= std::numeric_limits<int>::max() &&
                 sums <= std::numeric_limits<int>::max(),
             "a product of " << sums << " by " << params.width << " has too many tiles");
  programs = std::min(programs, params.tiles_m * params.tiles_n);
  const auto queue = static_cast<cudaStream_t>(stream);
  // An error left behind by somebody else must not be reported as a failed launch of this kernel.
  cudaGetLastError();
  if (problem.bfloat16) {
    problem.by_column ? launch<__nv_bfloat16, true>(params, programs, queue)
                      : launch<__nv_bfloat16, false>(params, programs, queue);
  } else {
    problem.by_column ? launch<__half, true>(params, programs, queue)
                      : launch<__half, false>(params, programs, queue);
  }
  check_cuda(cudaGetLastError(), "launching wgrad_kernel");
}

}  // namespace gisp
