// Declares the part of the binding that tt_linear, tt_gelu_linear and tt_norm_linear share.
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

// The producer of the layer, and the tensors of a norm.
struct ProducerArguments {
  Producer kind = Producer::none;
  std::optional<Tensor> gamma, beta;
  double eps = 0;
  Tensor mean, rstd;
};

// Raises an error if a needed gradient is computed from an operand that is absent.
void check_operands(
    const Needs& need, const std::optional<Tensor>& W, const std::optional<Tensor>& x, const std::optional<Tensor>& h);

// Both functions write to `into` if it is given, which is allowed without a producer.
Linear linear_forward(const Tensor& x, const ProducerArguments& producer, const Tensor& W,
    const std::optional<Tensor>& b, const Tensor& D, const Tensor& G, const Linear* into = nullptr);

LinearBackward linear_backward(const Tensor& gy, const std::optional<Tensor>& x, const ProducerArguments& producer,
    const std::optional<Tensor>& W, const std::optional<Tensor>& h, const Tensor& D, const Tensor& G, const Needs& need,
    const LinearBackward* into = nullptr);

}  // namespace efft
