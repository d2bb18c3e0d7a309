// Declares the functions of the torch binding that the ops tt_linear, tt_gelu_linear, tt_norm_linear and tt_mlp share.
// All but the first include the producer of a layer, the GELU or layer norm that runs directly before it. The file also
// defines the struct Right, which prepares the right operands of products.
#pragma once

#include <string>
#include <tuple>
#include <vector>

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
struct LayerProducer {
  Producer kind = Producer::none;
  std::optional<Tensor> gamma, beta;
  double eps = 0;
  std::optional<Tensor> mean, rstd;
};

inline LayerProducer gelu_producer(const std::string& approximate) {
  LayerProducer gelu;
  gelu.kind = approximate == "tanh" ? Producer::gelu_tanh : Producer::gelu;
  return gelu;
}

// A GELU that runs directly after a layer. If the kernel that computes the layer's output can also compute the GELU,
// `output` receives the GELU of the output, in the same shape and type. Otherwise `output` remains empty.
struct GeluAfterLayer {
  Producer kind;
  std::optional<Tensor> output;
};

// The sums over tokens of several layers, which one launch of reduce_tokens computes. `operands` keeps the tensors that
// the launch will read.
struct TokenSums {
  Reductions all;
  std::vector<Tensor> operands;
};

// The right operand [K, N] of a product. If the given tensor has aligned rows, it is used as it is. Otherwise its
// transpose [N, K] is used, and copied if its rows are not aligned either.
struct Right {
  Tensor rows;
  bool is_transposed;

  Right(const Tensor& of, const Launches& launches)
      : rows(has_aligned_rows(of) ? of : with_aligned_rows(transposed(of), of.scalar_type(), launches)),
        is_transposed(!has_aligned_rows(of)) {}

  // Returns the matrix T [R, N] of the tail (the rank-r product H T) in the type of the right operand. It is stored
  // transposed if the right operand is.
  Tensor tail(const Tensor& of, const Launches& launches) const {
    return with_aligned_rows(is_transposed ? transposed(of) : of, rows.scalar_type(), launches);
  }
};

// If `gelu` is given, the function may also compute the GELU that runs after the layer.
Linear linear_forward(const Tensor& x, const LayerProducer& producer, const Tensor& W, const std::optional<Tensor>& b,
    const Tensor& D, const Tensor& G, GeluAfterLayer* gelu = nullptr);

// If `later` is given and one launch can compute the sums over tokens of several layers, the sums of this layer are
// added to `later`, and the caller launches them. Otherwise this function launches them.
LinearBackward linear_backward(const Tensor& gy, const std::optional<Tensor>& x, const LayerProducer& producer,
    const std::optional<Tensor>& W, const std::optional<Tensor>& h, const Tensor& D, const Tensor& G, const Needs& need,
    TokenSums* later = nullptr);

}  // namespace efft
