// Implements efft::tt_mlp_{fwd,bwd}.cpu: an MLP of two adapted layers with a GELU between them, optionally after a
// layer norm. For each block of tokens, the forward pass adds b1 + h1 G1 to the base product of the first layer,
// applies the GELU, and computes h2 and h2 G2, while the rows of z are in the cache. The backward pass is that of the
// two layers.
#include "tt_linear.h"

namespace efft {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tt_mlp_fwd(Tensor x, std::optional<Tensor> gamma,
    std::optional<Tensor> beta, std::optional<double> eps, Tensor W1, std::optional<Tensor> b1, Tensor D1, Tensor G1,
    Tensor W2, std::optional<Tensor> b2, Tensor D2, Tensor G2, std::string approximate) {
  const int64_t statistics = eps.has_value() ? x.size(0) : 0;
  ProducerArguments norm;
  norm.mean = empty(x, {statistics}, ScalarType::Float);
  norm.rstd = empty(x, {statistics}, ScalarType::Float);
  if (eps.has_value()) norm = {Producer::norm, gamma, beta, *eps, norm.mean, norm.rstd};
  const auto [n, h1] = project(x, norm, W1, D1);
  const Tensor z = empty(W1, {x.size(0), W1.size(0)});
  multiply(z, n, transposed(W1), false);
  const PendingOutput pending{b1, h1, G1};
  const auto [y, h2] = linear_forward(z, gelu(approximate), W2, b2, D2, G2, nullptr, &pending);
  return {y, z, h1, h2, norm.mean, norm.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tt_mlp_bwd(Tensor gy, Tensor x,
    Tensor z, std::optional<Tensor> gamma, std::optional<Tensor> beta, std::optional<double> eps, Tensor mean,
    Tensor rstd, std::optional<Tensor> W1, std::optional<Tensor> W2, std::optional<Tensor> h1, std::optional<Tensor> h2,
    Tensor D1, Tensor G1, Tensor D2, Tensor G2, std::string approximate, bool need_dx, bool need_dD1, bool need_dG1,
    bool need_db1, bool need_dD2, bool need_dG2, bool need_db2, bool need_dgamma, bool need_dbeta) {
  const Needs first{need_dx, need_dD1, need_dG1, need_db1, need_dgamma, need_dbeta};
  const bool need_dz = need_dx || need_dD1 || need_dG1 || need_db1 || need_dgamma || need_dbeta;
  const LinearBackward of_second =
      linear_backward(gy, z, gelu(approximate), W2, h2, D2, G2, {need_dz, need_dD2, need_dG2, need_db2});
  ProducerArguments norm;
  if (eps.has_value()) norm = {Producer::norm, gamma, beta, *eps, with_unit_rows(mean), with_unit_rows(rstd)};
  // If dz is not needed, no gradient of the first layer is, and dz has no elements.
  const Tensor dz = need_dz ? of_second.dx : empty(z, {0, z.size(1)});
  const LinearBackward of_first = linear_backward(dz, x, norm, W1, h1, D1, G1, first);
  return {of_first.dx, of_first.dD, of_first.dG, of_first.db, of_second.dD, of_second.dG, of_second.db, of_first.dgamma,
      of_first.dbeta};
}

STABLE_TORCH_LIBRARY_IMPL(efft, CPU, library) {
  library.impl("tt_mlp_fwd.cpu", TORCH_BOX(&tt_mlp_fwd));
  library.impl("tt_mlp_bwd.cpu", TORCH_BOX(&tt_mlp_bwd));
}

}  // namespace

}  // namespace efft
