// Implements efft::tt_norm_linear_{fwd,bwd}.cuda, which compute a layer norm followed by tt_linear.
#include "tt_linear.h"

namespace efft {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> tt_norm_linear_fwd(Tensor x, std::optional<Tensor> gamma,
    std::optional<Tensor> beta, double eps, Tensor W, std::optional<Tensor> b, Tensor D, Tensor G) {
  const Tensor mean = empty(x, {x.size(0)}, ScalarType::Float), rstd = empty(x, {x.size(0)}, ScalarType::Float);
  const auto [y, h] = linear_forward(x, {Producer::norm, gamma, beta, eps, mean, rstd}, W, b, D, G);
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tt_norm_linear_bwd(Tensor gy, Tensor x,
    std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps, Tensor mean, Tensor rstd,
    std::optional<Tensor> W, std::optional<Tensor> h, Tensor D, Tensor G, bool need_dx, bool need_dD, bool need_dG,
    bool need_db, bool need_dgamma, bool need_dbeta) {
  const LayerProducer producer{
      Producer::norm, gamma, beta, eps, torch::stable::contiguous(mean), torch::stable::contiguous(rstd)};
  const Needs need{need_dx, need_dD, need_dG, need_db, need_dgamma, need_dbeta};
  const LinearBackward grads = linear_backward(gy, x, producer, W, h, D, G, need);
  return {grads.dx, grads.dD, grads.dG, grads.db, grads.dgamma, grads.dbeta};
}

STABLE_TORCH_LIBRARY_IMPL(efft, CUDA, library) {
  library.impl("tt_norm_linear_fwd.cuda", TORCH_BOX(&tt_norm_linear_fwd));
  library.impl("tt_norm_linear_bwd.cuda", TORCH_BOX(&tt_norm_linear_bwd));
}

}  // namespace

}  // namespace efft
