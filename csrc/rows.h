// Converts between matrices and tensors with any number of leading dimensions. These conversions create views without a
// call of torch's dispatcher, unless a tensor must be copied.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace efft {

using torch::stable::Tensor;

// Returns a view with the given sizes and strides that begins at the first element of `t`.
inline Tensor viewed(const Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, &made));
  return Tensor(made);
}

// Returns `t` [..., d] as a matrix [rows, d]. The matrix is a view of `t` if the strides allow this, else of a
// contiguous copy.
inline Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2) return t;
  int64_t rows = 1, stride = 0;
  bool even = true;  // whether the distance between successive rows is always the same
  for (int64_t i = t.dim() - 2; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (rows == 1) stride = t.stride(i);
    even = even && t.stride(i) == rows * stride;
    rows *= t.size(i);
  }
  if (!even && rows > 0) return as_rows(torch::stable::contiguous(t));
  return viewed(t, {rows, t.size(-1)}, {rows > 1 ? stride : t.size(-1), t.stride(-1)});
}

// Returns a contiguous matrix [rows, d] as a tensor [..., d] with the leading sizes of `like`.
inline Tensor with_leading_sizes(const Tensor& matrix, const Tensor& like) {
  const int64_t dim = like.dim();
  if (dim == 2) return matrix;
  std::vector<int64_t> sizes(dim), strides(dim);
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    sizes[i] = i == dim - 1 ? matrix.size(-1) : like.size(i);
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return viewed(matrix, sizes, strides);
}

}  // namespace efft
