// Declares the functions of the torch binding that the ops tt_linear, tt_gelu_linear, tt_norm_linear and tt_mlp share.
// All of them except tt_linear include the producer of a layer, the GELU or layer norm that runs directly before it.
#pragma once

#include <string>
#include <tuple>

#include "tensors.h"

namespace efft {

using Linear = std::tuple<Tensor, Tensor>;  // y (or a), h

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

// Returns the arguments for a GELU, "none" or "tanh" as in torch.nn.functional.gelu.
ProducerArguments gelu(const std::string& approximate);

// The part b + h G of the output of a layer that has not been added to the output yet.
struct PendingOutput {
  std::optional<Tensor> b;
  Tensor h, G;
};

// Computes a, the output of the producer, and h = a D, both in the type of `like`. Without a producer, a is x.
Linear project(const Tensor& x, const ProducerArguments& producer, const Tensor& like, const Tensor& D);

// linear_forward and linear_backward write their results to the tensors of `into` if it is given. This is allowed only
// without a producer. If the producer is a GELU, x may have a pending part, which linear_forward adds to x in place.
Linear linear_forward(const Tensor& x, const ProducerArguments& producer, const Tensor& W,
    const std::optional<Tensor>& b, const Tensor& D, const Tensor& G, const Linear* into = nullptr,
    const PendingOutput* pending = nullptr);

LinearBackward linear_backward(const Tensor& gy, const std::optional<Tensor>& x, const ProducerArguments& producer,
    const std::optional<Tensor>& W, const std::optional<Tensor>& h, const Tensor& D, const Tensor& G, const Needs& need,
    const LinearBackward* into = nullptr);

}  // namespace efft
