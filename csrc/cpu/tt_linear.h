// Declares the functions of the torch binding that the ops tt_linear, tt_gelu_linear and tt_norm_linear share. The
// latter two ops include the producer of the layer, the GELU or layer norm that runs directly before it.
#pragma once

#include <string>
#include <tuple>

#include "tensors.h"

namespace efft {

using Linear = std::tuple<Tensor, Tensor>;  // y, h

// States which gradients are needed.
struct Needs {
  bool dx, dD, dG, db, dgamma = false, dbeta = false;
};
// The computed gradients. A gradient that is not needed has 0 elements.
struct LinearBackward {
  Tensor dx, dD, dG, db, dgamma, dbeta;
};

// The producer of a layer, with the parameters and statistics of a norm. The forward pass writes mean and rstd.
struct ProducerArguments {
  Producer kind = Producer::none;
  std::optional<Tensor> gamma, beta;
  double eps = 0;
  Tensor mean, rstd;
};

// Raises an error if a gradient is needed, but an operand from which it is computed is absent.
void check_operands(
    const Needs& need, const std::optional<Tensor>& W, const std::optional<Tensor>& x, const std::optional<Tensor>& h);

// linear_forward and linear_backward write their results to the tensors of `into` if it is given. This is allowed only
// without a producer.
Linear linear_forward(const Tensor& x, const ProducerArguments& producer, const Tensor& W,
    const std::optional<Tensor>& b, const Tensor& D, const Tensor& G, const Linear* into = nullptr);

LinearBackward linear_backward(const Tensor& gy, const std::optional<Tensor>& x, const ProducerArguments& producer,
    const std::optional<Tensor>& W, const std::optional<Tensor>& h, const Tensor& D, const Tensor& G, const Needs& need,
    const LinearBackward* into = nullptr);

}  // namespace efft
