// Implements efft::tt_linear_grouped{,_fwd}.cuda, the forward pass of a layer in which each sample has the factors of
// its own adapter.
//
// The factors are always copied, to convert them to the type of the products. The copy contains one matrix per sample,
// so the products do not need the adapter indices: the matrices of a sample without an adapter contain zeros, and
// those of a sample whose adapter index is too large contain NaN. The backward pass
// (efft_kernels/ops/tt_linear_grouped.py) also uses tt_linear_grouped_fwd: it computes dx from gy and from the
// transposed weight and factors.
#include "tt_linear.h"

namespace efft {

namespace {

Linear tt_linear_grouped_fwd(Tensor x_, Tensor W, std::optional<Tensor> b_, Tensor D, Tensor G, Tensor adapter_) {
  const Launches launches(x_);
  const ScalarType type = W.scalar_type();
  const Tensor x = with_aligned_rows(x_, type, launches), adapter = torch::stable::contiguous(adapter_);
  const std::optional<Tensor> b = b_.has_value() ? std::optional(torch::stable::contiguous(*b_)) : std::nullopt;
  const Right right(transposed(W), launches);
  const Tensor P = packed(transposed(D), type, launches, adapter);
  const Tensor tail = packed(right.is_transposed ? transposed(G) : G, type, launches, adapter);

  Project down;
  down.samples = x.size(0);
  down.M = x.size(1);
  down.K = x.size(2);
  down.R = D.size(2);
  const Tensor h = empty_rows(x, {down.samples, down.M}, down.R, type);
  down.A = matrix(x);
  down.P = matrix(P);
  down.H = matrix(h);
  check(project(down, launches.stream()));

  const Tensor y = empty(W, {down.samples, down.M, W.size(0)});
  LowRankGemm product;
  product.samples = down.samples;
  product.M = down.M;
  product.N = W.size(0);
  product.K = down.K;
  product.R = down.R;
  product.A = down.A;
  product.B = matrix(right.rows);
  product.H = down.H;
  product.T = matrix(tail);
  product.transposed = right.is_transposed;
  product.bias = vector_of(b);
  product.Y = matrix(y);
  check(lowrank_gemm(product, launches.stream()));
  return {y, torch::stable::contiguous(h)};
}

Tensor tt_linear_grouped(Tensor x, Tensor W, std::optional<Tensor> b, Tensor D, Tensor G, Tensor adapter) {
  return std::get<0>(tt_linear_grouped_fwd(x, W, b, D, G, adapter));
}

STABLE_TORCH_LIBRARY_IMPL(efft, CUDA, library) {
  library.impl("tt_linear_grouped.cuda", TORCH_BOX(&tt_linear_grouped));
  library.impl("tt_linear_grouped_fwd.cuda", TORCH_BOX(&tt_linear_grouped_fwd));
}

}  // namespace

}  // namespace efft
