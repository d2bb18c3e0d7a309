// Implements efft::tt_merge_.cpu, which adds the update of a layer to its weight W or subtracts it:
// W += sign (D G)^T. D and G are the factors of the update. The sum is computed in float and rounded once.
#include "tensors.h"

namespace efft {

namespace {

void tt_merge_(Tensor W, Tensor D, Tensor G, double sign) {
  Tensor rows = with_unit_rows(W);
  const Panel up(G, Panel::Order::rows, false), Dt(D, Panel::Order::rows, true, static_cast<float>(sign));
  const Matrix to = matrix(rows);
  const int64_t d_in = D.size(0), rank = D.size(1);
  torch::stable::parallel_for(0, W.size(0), 64, [&](int64_t begin, int64_t end) {
    kernels().merge(to, up.data(), up.row(), Dt.as_matrix(), d_in, rank, begin, end);
  });
  if (rows.data_ptr() != W.data_ptr()) torch::stable::copy_(W, rows);
}

STABLE_TORCH_LIBRARY_IMPL(efft, CPU, library) {
  library.impl("tt_merge_.cpu", TORCH_BOX(&tt_merge_));
}

}  // namespace

}  // namespace efft
