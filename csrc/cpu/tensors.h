// Converts torch's tensors to the plain matrices of the kernels, using the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "../rows.h"
#include "kernels.h"

namespace efft {

using torch::headeronly::ScalarType;

inline Type type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
      "the cpu backend supports float32 and bfloat16 tensors, got another dtype");
  return type == ScalarType::Float ? Type::float32 : Type::bfloat16;
}

// Returns `t` if the elements of each row are contiguous and the distance between rows is not 0. Otherwise returns a
// contiguous copy. A distance of 0 (all rows have the same memory) must be avoided, because for the kernels it means
// that the matrix is stored in strips.
inline Tensor with_unit_rows(const Tensor& t) {
  const bool unit = t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1;
  const bool apart = t.dim() < 2 || t.size(-2) <= 1 || t.stride(-2) != 0;
  return unit && apart ? t : torch::stable::contiguous(t);
}

// Returns the matrix of the last two dimensions of `t`, whose rows must be contiguous. The matrix begins `offset`
// elements after the first element of `t`.
inline Matrix matrix(const Tensor& t, int64_t offset = 0) {
  const Type type = type_of(t);
  char* data = static_cast<char*>(t.data_ptr());
  return {data + offset * (type == Type::float32 ? 4 : 2), t.dim() < 2 ? 0 : t.stride(-2), type};
}

// Returns a pointer to the first element of `data` that lies at the beginning of a cache line, so that reading a full
// register, or a row of a tile, touches only one line. `data` must have LINE more elements than are used.
constexpr int64_t LINE = 64;
template <class T>
T* at_line(T* data) {
  void* at = data;
  size_t room = 2 * LINE;
  return static_cast<T*>(std::align(LINE, LINE, at, room));
}

// The number of elements that a thread can reorder in about 10 us. Waking another thread takes about as long.
constexpr int64_t WORTH_A_THREAD = 1 << 16;

// Runs `op` on torch's threads, among which the columns are divided.
inline void gather(const Gather& op) {
  constexpr int64_t width = 16;
  const int64_t grain = std::max<int64_t>(WORTH_A_THREAD / (width * std::max<int64_t>(op.rows, 1)), 1);
  torch::stable::parallel_for(0, (op.columns + width - 1) / width, grain,
      [&](int64_t first, int64_t last) { kernels().gather(op, first * width, std::min(op.columns, last * width)); });
}

// A factor, or its transpose, in the order in which a kernel reads it (see kernels.h).
class Panel {
 public:
  enum class Order : uint8_t {
    rows,    // rows, padded with zeros to a multiple of PANEL_COLUMNS; not copied if the factor already has this form
    strips,  // strips of STRIP_COLUMNS columns
  };

  // Creates a panel for products in `type`. Its elements are bf16 pairs if products in this type need them, else
  // floats.
  Panel(const Tensor& factor, Order order, bool transpose, Type type) : Panel(factor, order, transpose) {
    if (type != Type::bfloat16 || !kernels().pairs) return;
    // The panel of floats is stored as [strips, length, unit], where a panel in rows is one strip. Each strip is
    // interleaved separately.
    const int64_t even = (length_ + 1) / 2 * 2, unit = row_ != 0 ? row_ : STRIP_COLUMNS;
    pairs_.reset(new uint16_t[even * padded_ + LINE]);
    uint16_t* const pairs = at_line(pairs_.get());
    const int64_t grain = std::max<int64_t>(WORTH_A_THREAD / (2 * unit), 1);
    torch::stable::parallel_for(0, padded_ / unit * even / 2, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last;) {
        const int64_t strip = i / (even / 2), row = i % (even / 2), count = std::min(last - i, even / 2 - row);
        kernels().interleave(
            data_ + strip * length_ * unit, length_, unit, pairs + strip * even * unit, 2 * row, 2 * (row + count));
        i += count;
      }
    });
  }

  // Creates a panel of floats, which are multiplied by `scale`.
  Panel(const Tensor& factor, Order order, bool transpose, float scale = 1) : tensor_(with_unit_rows(factor)) {
    const int64_t rows = factor.size(-2), columns = factor.size(-1);
    const int64_t width = transpose ? rows : columns, length = transpose ? columns : rows;
    const int64_t unit = order == Order::rows ? PANEL_COLUMNS : STRIP_COLUMNS;
    const int64_t padded = (width + unit - 1) / unit * unit;
    length_ = length;
    padded_ = padded;
    row_ = order == Order::rows ? padded : 0;
    const Matrix from = matrix(tensor_);
    const bool is_panel = width == padded && from.row == padded && from.type == Type::float32;
    if (order == Order::rows && !transpose && scale == 1 && is_panel) {
      data_ = static_cast<const float*>(from.data);
      return;
    }
    const int64_t room = length * padded + LINE;
    copy_.reset(width == padded ? new float[room] : new float[room]());
    data_ = at_line(copy_.get());
    gather({from, 1, 0, rows, columns, scale, transpose, as_matrix()});
  }

  const float* data() const { return data_; }
  const void* elements() const { return pairs_ ? static_cast<const void*>(at_line(pairs_.get())) : data_; }
  int64_t row() const { return row_; }
  Matrix as_matrix() const { return {const_cast<float*>(data_), row_, Type::float32}; }

 private:
  Tensor tensor_;  // keeps the memory of the factor alive if it is not copied
  std::unique_ptr<float[]> copy_;
  std::unique_ptr<uint16_t[]> pairs_;
  const float* data_ = nullptr;
  int64_t row_ = 0, length_ = 0, padded_ = 0;
};

// Computes out = left right, or out += left right, with the library that torch uses for matrix products.
inline void multiply(const Tensor& out, const Tensor& left, const Tensor& right, bool accumulate) {
  if (out.numel() == 0) return;
  const AOTITorchError failed = accumulate
                                    ? aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1, 1)
                                    : aoti_torch_cpu_mm_out(out.get(), left.get(), right.get());
  STD_TORCH_CHECK(!failed, "torch's matrix product failed, and torch has printed the reason");
}

// Creates an uninitialized contiguous tensor with torch's C interface. This takes a microsecond or two, whereas calling
// an operator by its name takes about ten.
inline Tensor empty(
    const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> type = std::nullopt) {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  if (type.has_value()) dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes.begin()[i], 1)) strides[i] = stride;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), dtype, device_type, device_index, &made));
  return Tensor(made);
}

// Returns a view that begins `offset` elements after the first element of `t`.
inline Tensor view(
    const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, int64_t offset = 0) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), offset, &made));
  return Tensor(made);
}

inline Tensor transposed(const Tensor& t) {
  return view(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)});
}

// Returns a vector as a matrix with one row.
inline Tensor as_row(const Tensor& t) {
  return view(t, {1, t.size(0)}, {t.size(0), t.stride(0)});
}

// Divides the tokens into one part per thread of torch. The size of a part is a multiple of 8 tokens. If there are
// fewer than 32 tokens per thread, fewer threads are used.
struct Parts {
  int64_t tokens, size, count;

  explicit Parts(int64_t tokens) : tokens(tokens) {
    constexpr int64_t least = 32, tile = 8;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = std::clamp<int64_t>(tokens / least, 1, threads);
    size = ((tokens + wanted - 1) / wanted + tile - 1) / tile * tile;
    size = std::max(size, tile);
    count = (tokens + size - 1) / size;
  }

  // Calls f(part, begin, end) for each part.
  template <class F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) f(part, part * size, std::min(tokens, (part + 1) * size));
    });
  }
};

}  // namespace efft
