// Implements efft::tt_contract_{fwd,bwd}.cuda. In each direction, one launch processes all layers and cores of a tensor
// train. Factors and masks that are not contiguous are copied, which is cheap because they are small.
#include <tuple>

#include "tensors.h"

namespace efft {

namespace {

using Mask = std::optional<Tensor>;
using torch::stable::contiguous;

// The contiguous factors and masks of a tensor train, and the struct that describes them to the kernels.
struct Train {
  Tensor C, V;
  Mask keep_C, keep_V;
  Contraction op;

  Train(const Tensor& C_, const Tensor& V_, const Mask& keep_C_, const Mask& keep_V_, double scale)
      : C(contiguous(C_)), V(contiguous(V_)) {
    if (keep_C_.has_value()) keep_C = contiguous(*keep_C_);
    if (keep_V_.has_value()) keep_V = contiguous(*keep_V_);
    op.n_layers = C.size(0);
    op.n_cores = C.size(1);
    op.r1 = C.size(2);
    op.r2 = C.size(3);
    op.d_out = V.size(1);
    op.C = vector_of(C);
    op.V = vector_of(V);
    if (keep_C) op.keep_C = static_cast<const uint8_t*>(keep_C->data_ptr());
    if (keep_V) op.keep_V = static_cast<const uint8_t*>(keep_V->data_ptr());
    op.scale = static_cast<float>(scale);
  }
};

Tensor tt_contract_fwd(Tensor C, Tensor V, Mask keep_C, Mask keep_V, double scale) {
  const Launches launches(C);
  const Train train(C, V, keep_C, keep_V, scale);
  const Tensor G = empty(C, {train.op.n_layers, train.op.r1, train.op.n_cores * train.op.d_out});
  check(contract(train.op, G.data_ptr(), launches.stream()));
  return G;
}

std::tuple<Tensor, Tensor> tt_contract_bwd(
    Tensor dG_, Tensor C, Tensor V, Mask keep_C, Mask keep_V, double scale, bool need_dC, bool need_dV) {
  const Launches launches(C);
  const Train train(C, V, keep_C, keep_V, scale);
  const Tensor dG = contiguous(dG_);
  const Contraction& op = train.op;
  const Tensor dC = need_dC ? empty(C, {op.n_layers, op.n_cores, op.r1, op.r2}) : empty(C, {0});
  const Tensor dV = need_dV ? empty(V, {op.r2, op.d_out}) : empty(V, {0});
  check(contract_backward(
      op, vector_of(dG), need_dC ? dC.data_ptr() : nullptr, need_dV ? dV.data_ptr() : nullptr, launches.stream()));
  return {dC, dV};
}

STABLE_TORCH_LIBRARY_IMPL(efft, CUDA, library) {
  library.impl("tt_contract_fwd.cuda", TORCH_BOX(&tt_contract_fwd));
  library.impl("tt_contract_bwd.cuda", TORCH_BOX(&tt_contract_bwd));
}

}  // namespace

}  // namespace efft
