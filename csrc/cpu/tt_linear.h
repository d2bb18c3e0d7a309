// What tt_linear and its forms behind a GELU and a layer norm share in the binding.
#pragma once

#include <string>
#include <tuple>

#include "tensors.h"

namespace efft {

using Linear = std::tuple<Tensor, Tensor>;                  // y, h
using LinearBackward = std::tuple<Tensor, Tensor, Tensor>;  // dx, dD, dG

// The input stage: which one, and what a norm brings.
struct Stage {
  Input input = Input::plain;
  std::optional<Tensor> gamma, beta;
  double eps = 0;
  Tensor mean, rstd;
};

Linear linear_forward(const Tensor& x, const Stage& stage, const Tensor& W, const std::optional<Tensor>& b,
    const Tensor& D, const Tensor& G);

LinearBackward linear_backward(const Tensor& gy, const std::optional<Tensor>& x, const Stage& stage,
    const std::optional<Tensor>& W, const std::optional<Tensor>& h, const Tensor& D, const Tensor& G, bool need_dx,
    bool need_dD, bool need_dG);

}  // namespace efft
