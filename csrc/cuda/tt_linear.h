// What tt_linear and its forms behind a GELU and a layer norm share in the binding.
#pragma once

#include <string>
#include <tuple>

#include "tensors.h"

namespace efft {

using Linear = std::tuple<Tensor, Tensor>;  // y, h

// Which gradients are needed, and those gradients; one that is not needed has 0 elements.
struct Needs {
  bool dx, dD, dG, db, dgamma = false, dbeta = false;
};
struct LinearBackward {
  Tensor dx, dD, dG, db, dgamma, dbeta;
};

// The producer of a layer, and what a norm brings.
struct LayerProducer {
  Producer kind = Producer::none;
  std::optional<Tensor> gamma, beta;
  double eps = 0;
  std::optional<Tensor> mean, rstd;
};

// The right side [K, N] of a product, in whichever order its rows are aligned.
struct Right {
  Tensor rows;
  bool is_transposed;

  Right(const Tensor& of, const Launches& launches)
      : rows(has_aligned_rows(of) ? of : with_aligned_rows(transposed(of), of.scalar_type(), launches)),
        is_transposed(!has_aligned_rows(of)) {}

  // The right side of the tail, [R, N], in the same order.
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
