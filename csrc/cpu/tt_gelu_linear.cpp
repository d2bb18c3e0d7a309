// Implements efft::tt_gelu_linear_{fwd,bwd}.cpu: the forward pass of a GELU followed by tt_linear, and its gradients.
// The GELU is computed for one block of tokens at a time.
#include "tt_linear.h"

namespace efft {

namespace {

Linear tt_gelu_linear_fwd(Tensor z, Tensor W, std::optional<Tensor> b, Tensor D, Tensor G, std::string approximate) {
  return linear_forward(z, gelu(approximate), W, b, D, G);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tt_gelu_linear_bwd(Tensor gy, Tensor z, std::optional<Tensor> W,
    std::optional<Tensor> h, Tensor D, Tensor G, std::string approximate, bool need_dz, bool need_dD, bool need_dG,
    bool need_db) {
  const Needs need{need_dz, need_dD, need_dG, need_db};
  const LinearBackward grads = linear_backward(gy, z, gelu(approximate), W, h, D, G, need);
  return {grads.dx, grads.dD, grads.dG, grads.db};
}

STABLE_TORCH_LIBRARY_IMPL(efft, CPU, library) {
  library.impl("tt_gelu_linear_fwd.cpu", TORCH_BOX(&tt_gelu_linear_fwd));
  library.impl("tt_gelu_linear_bwd.cpu", TORCH_BOX(&tt_gelu_linear_bwd));
}

}  // namespace

}  // namespace efft
