// The passes between tensors and flat buffers. Those of a single tensor are here for tests only.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bind/bind.h"
#include "kernels/scale.h"
#include "tensor/dtype.h"
#include "tensor/flatten.h"

namespace py = pybind11;

namespace fastddp {
namespace {

using Kernel = void (*)(DType, void*, DType, const void*, std::size_t, double);

// Makes a kernel callable on two contiguous CPU tensors.
auto on_tensors(Kernel kernel) {
  return [kernel](const at::Tensor& dst, const at::Tensor& src, double scale) {
    TORCH_CHECK_VALUE(dst.is_cpu() && src.is_cpu() && dst.is_contiguous() && src.is_contiguous() &&
                          dst.sizes() == src.sizes(),
                      "expected two contiguous CPU tensors of one shape");
    const auto to = dtype_of(dst.scalar_type()), from = dtype_of(src.scalar_type());
    TORCH_CHECK_TYPE(to && from && !dst.is_complex() && !src.is_complex() && converts(*from, *to),
                     "expected floating point tensors, float64 for float64, got ",
                     dst.scalar_type(), " and ", src.scalar_type());
    kernel(*to, dst.data_ptr(), *from, src.const_data_ptr(), static_cast<std::size_t>(dst.numel()),
           scale);
  };
}

// Pairs contiguous tensors with their places in the flat buffer. All have one dtype and lie on the
// device of the buffer.
std::vector<FlatPiece> pieces_of(const at::Tensor& flat,
                                 const std::vector<at::Tensor>& tensors,
                                 const std::vector<std::int64_t>& offsets) {
  TORCH_CHECK_VALUE(flat.is_contiguous() && flat.dim() == 1 && tensors.size() == offsets.size() &&
                        !tensors.empty(),
                    "expected a flat buffer, and an offset for each of at least one tensor");
  std::vector<FlatPiece> pieces;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    TORCH_CHECK_VALUE(tensor.is_contiguous() && !tensor.is_complex() && !tensor.is_neg() &&
                          tensor.device() == flat.device() &&
                          tensor.scalar_type() == tensors.front().scalar_type() &&
                          offsets[i] >= 0 && offsets[i] <= flat.numel() - tensor.numel(),
                      "tensor ", i,
                      " is not contiguous, not like the others in dtype and device, "
                      "or has no room at offset ",
                      offsets[i]);
    pieces.push_back({tensor, offsets[i], tensor.numel()});
  }
  return pieces;
}

void flatten_tensors(const at::Tensor& flat,
                     const std::vector<at::Tensor>& tensors,
                     const std::vector<std::int64_t>& offsets,
                     double scale,
                     const std::optional<at::Tensor>& moments) {
  TORCH_CHECK_VALUE(
      !moments || (moments->is_contiguous() && moments->numel() == 2 &&
                   moments->scalar_type() == at::kDouble && moments->device() == flat.device()),
      "expected moments of two float64 elements, one after the other");
  flatten(flat, pieces_of(flat, tensors, offsets), tensors.front().scalar_type(), scale,
          moments.value_or(at::Tensor()));
}

void unflatten_tensors(const at::Tensor& flat,
                       const std::vector<at::Tensor>& tensors,
                       const std::vector<std::int64_t>& offsets,
                       double scale) {
  unflatten(flat, pieces_of(flat, tensors, offsets), tensors.at(0).scalar_type(), scale);
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.attr("has_cuda") = kHasCuda;
  m.def("flatten", &flatten_tensors, py::arg("flat"), py::arg("tensors"), py::arg("offsets"),
        py::arg("scale"), py::arg("moments"), py::call_guard<py::gil_scoped_release>());
  m.def("unflatten", &unflatten_tensors, py::arg("flat"), py::arg("tensors"), py::arg("offsets"),
        py::arg("scale"), py::call_guard<py::gil_scoped_release>());
  m.def("scale_copy", on_tensors(&scale_copy), py::arg("dst"), py::arg("src"), py::arg("scale"));
  m.def("scale_add", on_tensors(&scale_add), py::arg("dst"), py::arg("src"), py::arg("scale"));
}

}  // namespace fastddp
