#include "tensor/flatten.h"

#include <ATen/ATen.h>
#ifdef FASTDDP_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "kernels/fused_flatten.h"
#include "tensor/slot.h"

namespace fastddp {
namespace {

FlatPass pass_of(const at::Tensor& flat, at::ScalarType dtype, double scale) {
  const auto piece = dtype_of(dtype), whole = dtype_of(flat.scalar_type());
  TORCH_CHECK_TYPE(piece && whole && converts(*piece, *whole),
                   "fastddp: no conversion between tensors of ", dtype, " and a flat buffer of ",
                   flat.scalar_type());
  return {*piece, *whole, scale};
}

std::vector<Piece> addresses(const std::vector<FlatPiece>& pieces) {
  std::vector<Piece> result;
  result.reserve(pieces.size());
  for (const FlatPiece& piece : pieces) {
    void* data =
        piece.tensor.defined() ? const_cast<void*>(piece.tensor.const_data_ptr()) : nullptr;
    result.push_back({data, piece.offset, piece.numel});
  }
  return result;
}

// Returns the elements of a piece in the order of memory.
at::Tensor as_vector(const FlatPiece& piece) { return piece.tensor.as_strided({piece.numel}, {1}); }

}  // namespace

void flatten(const at::Tensor& flat,
             const std::vector<FlatPiece>& pieces,
             at::ScalarType dtype,
             double scale,
             const at::Tensor& moments) {
  const FlatPass pass = pass_of(flat, dtype, scale);
  auto* totals = moments.defined() ? static_cast<Moments*>(moments.data_ptr()) : nullptr;
  if (flat.is_cpu()) {
    fused_flatten(pass, addresses(pieces), flat.data_ptr(), totals);
    return;
  }
#ifdef FASTDDP_CUDA
  if (flat.is_cuda()) {
    const c10::cuda::CUDAGuard guard(flat.device());
    const auto places = addresses(pieces);
    const auto scratch_numel = totals == nullptr ? 0 : cuda::moments_scratch(places);
    const at::Tensor scratch =
        at::empty({static_cast<std::int64_t>(scratch_numel)}, flat.options().dtype(at::kFloat));
    cuda::fused_flatten(pass, places, flat.data_ptr(),
                        c10::cuda::getCurrentCUDAStream(flat.get_device()).stream(), totals,
                        totals == nullptr ? nullptr : scratch.data_ptr<float>());
    return;
  }
#endif
  TORCH_CHECK(totals == nullptr, "fastddp: no moments on ", flat.device());
  for (const FlatPiece& piece : pieces) {
    const at::Tensor place = flat.narrow(0, piece.offset, piece.numel);
    if (piece.tensor.defined()) {
      write(place, as_vector(piece), scale);
    } else {
      place.zero_();
    }
  }
}

void unflatten(const at::Tensor& flat,
               const std::vector<FlatPiece>& pieces,
               at::ScalarType dtype,
               double scale) {
  const FlatPass pass = pass_of(flat, dtype, scale);
  if (flat.is_cpu()) {
    fused_unflatten(pass, addresses(pieces), flat.const_data_ptr());
    return;
  }
#ifdef FASTDDP_CUDA
  if (flat.is_cuda()) {
    const c10::cuda::CUDAGuard guard(flat.device());
    cuda::fused_unflatten(pass, addresses(pieces), flat.const_data_ptr(),
                          c10::cuda::getCurrentCUDAStream(flat.get_device()).stream());
    return;
  }
#endif
  for (const FlatPiece& piece : pieces)
    write(as_vector(piece), flat.narrow(0, piece.offset, piece.numel), scale);
}

}  // namespace fastddp
