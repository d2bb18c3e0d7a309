// Converts torch's tensors to the plain matrices of the kernels, using the stable ABI. Tensors that the kernels cannot
// read directly are packed, that is, copied into another type or with aligned rows.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <initializer_list>
#include <optional>

#include "../rows.h"
#include "kernels.h"

// Only torch's CUDA library defines this function. The declaration is weak, so that our library can also be loaded with
// a torch without CUDA. It then cannot launch kernels.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace efft {

using torch::headeronly::ScalarType;

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "efft, backend 'cuda': ", cudaGetErrorString(error));
}

// The GPU and the stream on which one call of an op launches its kernels: the GPU of the tensors, and torch's current
// stream on it. During the lifetime of this object, this GPU is the current one. The object also collects the copies of
// operands until a kernel may read them, so that one launch performs several copies.
class Launches {
 public:
  explicit Launches(const Tensor& on) {
    STD_TORCH_CHECK(is_generation_known(), "efft, backend 'cuda': expected EFFT_SM90_GENERATION to be 1, 2 or 3, got '",
        std::getenv("EFFT_SM90_GENERATION"), "'; unset it, or set it to one of these before the program starts");
    if (on.is_cuda()) {
      device_ = on.get_device_index();
      // On a stream other than torch's, kernels could run before their operands have been computed.
      STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream,
          "efft, backend 'cuda': expected a torch that provides its current CUDA stream, but the symbol "
          "aoti_torch_get_current_cuda_stream is missing; install a CUDA build of torch 2.10 or newer");
      void* stream = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
      stream_ = static_cast<cudaStream_t>(stream);
      check(cudaGetDevice(&before_));
      check(cudaSetDevice(device_));  // needed even if this GPU is current: a thread of autograd may lack a context
    }
    check(load_kernels());
  }
  ~Launches() {
    if (before_ != device_) cudaSetDevice(before_);  // only if necessary, because the call can create a context
  }
  Launches(const Launches&) = delete;
  Launches& operator=(const Launches&) = delete;

  // Launches the collected copies on the stream and returns the stream. Kernels that are then launched on it can read
  // the copies.
  cudaStream_t stream() const {
    flush();
    return stream_;
  }
  // Adds a copy to the collected copies. If there are already Packs::MOST copies, launches these first.
  void pack(const Pack& op) const {
    if (copies_.count == Packs::MOST) flush();
    copies_.of[copies_.count++] = op;
  }

 private:
  void flush() const {
    check(efft::pack(copies_, stream_));
    copies_.count = 0;
  }

  int before_ = 0, device_ = 0;
  cudaStream_t stream_ = nullptr;
  mutable Packs copies_;
};

inline Type type_of(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "the cuda backend supports float32, bfloat16 and float16 tensors, got another dtype");
  return type == ScalarType::Float ? Type::float32 : type == ScalarType::BFloat16 ? Type::bfloat16 : Type::float16;
}

inline Type type_of(const Tensor& t) {
  return type_of(t.scalar_type());
}

inline Tensor empty(
    const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

// Returns an uninitialized tensor [*lead, columns], where `lead` has one or two sizes. Its rows can be copied 16 bytes
// at a time: if `columns` is not a multiple of 8, the distance between rows is the next multiple of 8.
inline Tensor empty_rows(
    const Tensor& like, std::initializer_list<int64_t> lead, int64_t columns, std::optional<ScalarType> type) {
  const int64_t padded = (columns + 7) / 8 * 8;
  const Tensor all = lead.size() == 1 ? empty(like, {*lead.begin(), padded}, type)
                                      : empty(like, {*lead.begin(), *(lead.begin() + 1), padded}, type);
  Tensor unpadded = all;
  return padded == columns ? all : torch::stable::narrow(unpadded, -1, 0, columns);
}

// Returns a tensor [rows, columns] or [samples, rows, columns] as a Matrix. The row stride of a tensor with a single
// row may be any number. It is replaced by a multiple of 8 elements, because copies of 16 bytes need aligned rows.
inline Matrix matrix(const Tensor& t) {
  const int64_t row = t.size(-2) > 1 ? t.stride(-2) : (t.size(-1) + 7) / 8 * 8;
  return {t.data_ptr(), row, t.dim() == 3 ? t.stride(0) : 0, type_of(t)};
}

inline Vector vector_of(const std::optional<Tensor>& t) {
  return t.has_value() ? Vector{t->data_ptr(), type_of(*t)} : Vector{};
}

inline bool has_aligned_rows(const Tensor& t) {
  const auto aligned = [&](int64_t elements) { return elements * static_cast<int64_t>(t.element_size()) % 16 == 0; };
  bool all = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && (t.size(-1) <= 1 || t.stride(-1) == 1);
  for (int64_t i = 0; i + 1 < t.dim(); ++i) all = all && (t.size(i) <= 1 || aligned(t.stride(i)));
  return all;
}

// Returns a copy of `t` in `type` with aligned rows. The next call of launches.stream() performs the copy. If
// `adapter` is given, sample i of the copy is matrix adapter[i] of `t`; Pack in kernels.h describes the treatment of
// other indices.
inline Tensor packed(
    const Tensor& t, ScalarType type, const Launches& launches, const std::optional<Tensor>& adapter = std::nullopt) {
  const bool batched = t.dim() == 3;
  Pack op;
  op.samples = adapter ? adapter->size(0) : batched ? t.size(0) : 1;
  op.rows = t.size(-2);
  op.columns = t.size(-1);
  Tensor to =
      batched ? empty_rows(t, {op.samples, op.rows}, op.columns, type) : empty_rows(t, {op.rows}, op.columns, type);
  op.from = t.data_ptr();
  op.type = type_of(t);
  op.from_sample = batched ? t.stride(0) : 0;
  op.from_row = t.stride(-2);
  op.from_column = t.stride(-1);
  if (adapter) {
    op.adapter = static_cast<const int64_t*>(adapter->data_ptr());
    op.adapters = t.size(0);
  }
  op.to = matrix(to);
  op.to.row = (op.columns + 7) / 8 * 8;
  launches.pack(op);
  return to;
}

// Returns `t` if it has the type `type` and aligned rows, else a copy with both. Contiguous operands of this type need
// no copy if the widths of the layer are multiples of 8.
inline Tensor with_aligned_rows(const Tensor& t, ScalarType type, const Launches& launches) {
  return t.scalar_type() == type && has_aligned_rows(t) ? t : packed(t, type, launches);
}

inline Tensor transposed(const Tensor& t) {
  return torch::stable::transpose(t, -2, -1);
}

}  // namespace efft
