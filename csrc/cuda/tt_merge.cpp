// Implements efft::tt_merge_.cuda, which adds the update of a layer to its weight W or subtracts it:
// W += sign (D G)^T. D and G are the factors of the update. The sum is computed in float and rounded once.
#include "tensors.h"

namespace efft {

namespace {

void tt_merge_(Tensor W, Tensor D, Tensor G, double sign) {
  const Launches launches(W);
  Merge op;
  op.d_out = W.size(0);
  op.d_in = W.size(1);
  op.rank = D.size(1);
  op.W = W.data_ptr();
  op.type = type_of(W);
  op.W_row = W.stride(0);
  op.W_column = W.stride(1);
  op.D = vector_of(D);
  op.D_row = D.stride(0);
  op.D_column = D.stride(1);
  op.G = vector_of(G);
  op.G_row = G.stride(0);
  op.G_column = G.stride(1);
  op.sign = static_cast<float>(sign);
  check(merge(op, launches.stream()));
}

STABLE_TORCH_LIBRARY_IMPL(efft, CUDA, library) {
  library.impl("tt_merge_.cuda", TORCH_BOX(&tt_merge_));
}

}  // namespace

}  // namespace efft
