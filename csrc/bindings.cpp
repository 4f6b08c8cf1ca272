// Python module gisp_kernels._core: integers in, integers out. Memory belongs to the caller and must outlive the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "gisp/check.h"
#include "gisp/swap.h"
#include "gisp/wgrad.h"

namespace py = pybind11;

namespace {

using Layout = std::tuple<std::uint64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                          std::int64_t, std::int64_t>;

template <typename T>
T* as_pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::int64_t plan_swaps(const std::vector<Layout>& layouts, std::uintptr_t pairs, std::uintptr_t table,
                        std::size_t table_bytes) {
  std::vector<gisp::BlockLayout> tensors;
  tensors.reserve(layouts.size());
  std::int64_t pair_count = 0;
  for (const auto& [address, element_size, count, rows, run, pitch, step, swaps] : layouts) {
    tensors.push_back({address, element_size, count, rows, run, pitch, step, swaps});
    pair_count += swaps;
  }
  const std::size_t needed = gisp::swap_table_bytes(static_cast<std::int64_t>(tensors.size()), pair_count);
  GISP_CHECK(table_bytes >= needed, "the table holds " << table_bytes << " bytes but needs " << needed);
  return gisp::plan_swaps(tensors, as_pointer<const std::int64_t>(pairs), as_pointer<void>(table));
}

#if GISP_WITH_SM90
using Operand = std::tuple<std::uint64_t, std::int64_t, std::int64_t>;
using ScoredLayer = std::tuple<std::uint64_t, std::int64_t, std::int64_t, std::int64_t>;

void wgrad_sums_sm90(const Operand& left, const Operand& right, std::int64_t tokens,
                     const std::vector<ScoredLayer>& layers, bool by_column, bool bfloat16, std::uintptr_t partials,
                     int programs, int device, std::uintptr_t stream) {
  const auto operand = [](const Operand& from) {
    return gisp::WgradOperand{std::get<0>(from), std::get<1>(from), std::get<2>(from)};
  };
  gisp::WgradProblem problem{operand(left), operand(right), tokens, {}, by_column, bfloat16};
  for (const auto& [address, pitch, rows, start] : layers) problem.layers.push_back({address, pitch, rows, start});
  gisp::wgrad_sums_sm90(problem, as_pointer<float>(partials), programs, device, as_pointer<void>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of gisp_kernels; use it through gisp_kernels.ops.swap.";
  m.attr("cuda") = static_cast<bool>(GISP_WITH_CUDA);
  m.attr("cuda_archs") = GISP_CUDA_ARCHS;
  m.attr("sm90") = static_cast<bool>(GISP_WITH_SM90);
  m.attr("compiler") = GISP_COMPILER;
  m.attr("nvcc") = GISP_NVCC;
  m.def("swap_table_bytes", &gisp::swap_table_bytes, py::arg("tensors"), py::arg("pairs"));
  m.def("plan_swaps", &plan_swaps, py::arg("layouts"), py::arg("pairs"), py::arg("table"), py::arg("table_bytes"),
        "Fill a table; a layout is (address, element_size, count, rows, run, pitch, step, pairs).");
  m.def(
      "swap_blocks_cpu",
      [](std::uintptr_t table, std::int64_t tensors) { gisp::swap_blocks_cpu(as_pointer<void>(table), tensors); },
      py::arg("table"), py::arg("tensors"), py::call_guard<py::gil_scoped_release>());
#if GISP_WITH_CUDA
  m.def(
      "swap_blocks_cuda",
      [](std::uintptr_t table, std::int64_t tensors, std::int64_t chunks, int device, std::uintptr_t stream) {
        gisp::swap_blocks_cuda(as_pointer<void>(table), tensors, chunks, device, as_pointer<void>(stream));
      },
      py::arg("table"), py::arg("tensors"), py::arg("chunks"), py::arg("device"), py::arg("stream"));
#endif
#if GISP_WITH_SM90
  m.attr("wgrad_tile") = std::make_tuple(gisp::kWgradTileRows, gisp::kWgradTileWidth);
  m.attr("wgrad_max_layers") = gisp::kWgradMaxLayers;
  m.def("wgrad_sums_sm90", &wgrad_sums_sm90, py::arg("left"), py::arg("right"), py::arg("tokens"), py::arg("layers"),
        py::arg("by_column"), py::arg("bfloat16"), py::arg("partials"), py::arg("programs"), py::arg("device"),
        py::arg("stream"),
        "Tile sums of |W * (left^T right)|; an operand is (address, pitch, columns), a layer (address, pitch, rows, "
        "start), pitches in bytes.");
#endif
}
