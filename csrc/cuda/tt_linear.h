// Declares the part of the binding that tt_linear, tt_gelu_linear and tt_norm_linear share. The latter two ops include
// the producer of the layer, the GELU or layer norm that runs directly before it.
#pragma once

#include <string>
#include <tuple>

#include "tensors.h"

namespace efft {

using Linear = std::tuple<Tensor, Tensor>;  // y, h

// The gradients that are needed, and the computed gradients; a gradient that is not needed has 0 elements.
struct Needs {
  bool dx, dD, dG, db, dgamma = false, dbeta = false;
};
struct LinearBackward {
  Tensor dx, dD, dG, db, dgamma, dbeta;
};

// The producer of a layer, with the parameters and statistics of a norm. The forward pass writes mean and rstd.
struct LayerProducer {
  Producer kind = Producer::none;
  std::optional<Tensor> gamma, beta;
  double eps = 0;
  std::optional<Tensor> mean, rstd;
};

// The right operand [K, N] of a product. It is stored as [K, N] or transposed, depending on which of the two has
// aligned rows.
struct Right {
  Tensor rows;
  bool is_transposed;

  Right(const Tensor& of, const Launches& launches)
      : rows(has_aligned_rows(of) ? of : with_aligned_rows(transposed(of), of.scalar_type(), launches)),
        is_transposed(!has_aligned_rows(of)) {}

  // Returns the right operand of the tail (the rank-r product H T), [R, N], in the same order.
  Tensor tail(const Tensor& of, const Launches& launches) const {
    return with_aligned_rows(is_transposed ? transposed(of) : of, rows.scalar_type(), launches);
  }
};

Linear linear_forward(const Tensor& x, const LayerProducer& producer, const Tensor& W, const std::optional<Tensor>& b,
    const Tensor& D, const Tensor& G);

LinearBackward linear_backward(const Tensor& gy, const std::optional<Tensor>& x, const LayerProducer& producer,
    const std::optional<Tensor>& W, const std::optional<Tensor>& h, const Tensor& D, const Tensor& G,
    const Needs& need);

}  // namespace efft
