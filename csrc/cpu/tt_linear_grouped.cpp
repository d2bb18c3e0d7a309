// Implements efft::tt_linear_grouped.cpu: one base product for all samples, then each sample with its adapter's
// factors.
#include "tensors.h"

namespace efft {

namespace {

Tensor tt_linear_grouped(Tensor x_, Tensor W, std::optional<Tensor> b, Tensor D, Tensor G, Tensor adapter_) {
  const Tensor x = torch::stable::contiguous(x_), adapter = torch::stable::contiguous(adapter_);
  const int64_t samples = x.size(0), tokens = x.size(1), d_in = x.size(2), d_out = W.size(0);
  Tensor y = empty(W, {samples, tokens, d_out});
  multiply(view(y, {samples * tokens, d_out}, {d_out, 1}), view(x, {samples * tokens, d_in}, {d_in, 1}), transposed(W),
      false);
  std::optional<Panel> bias;
  if (b.has_value()) bias.emplace(as_row(*b), Panel::Order::rows, false);
  const auto* ids = static_cast<const int64_t*>(adapter.data_ptr());
  for (int64_t i = 0; i < samples; ++i)
    STD_TORCH_CHECK(ids[i] < D.size(0), "tt_linear_grouped: there are ", D.size(0), " adapters, got index ", ids[i]);
  const Type type = type_of(x);
  const int64_t size = type == Type::float32 ? 4 : 2;
  torch::stable::parallel_for(0, samples, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Forward op;
      op.d_in = d_in;
      op.d_out = d_out;
      op.x = {static_cast<char*>(x.data_ptr()) + i * tokens * d_in * size, d_in, type};
      op.y = {static_cast<char*>(y.data_ptr()) + i * tokens * d_out * size, d_out, type};
      op.base = op.y;
      op.b = bias ? bias->data() : nullptr;
      if (ids[i] < 0) {  // no adapter: op has rank 0
        kernels().forward(op, 0, tokens);
        continue;
      }
      const Panel down(torch::stable::select(D, 0, ids[i]), Panel::Order::rows, false, type);
      const Panel up(torch::stable::select(G, 0, ids[i]), Panel::Order::strips, false, type);
      op.rank = D.size(2);
      op.padded_rank = down.row();
      op.D = down.elements();
      op.G = up.elements();
      kernels().forward(op, 0, tokens);
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(efft, CPU, library) {
  library.impl("tt_linear_grouped.cpu", TORCH_BOX(&tt_linear_grouped));
}

}  // namespace

}  // namespace efft
