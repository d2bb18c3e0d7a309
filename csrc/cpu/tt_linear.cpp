// efft::tt_linear_{fwd,bwd}.cpu and, through another input stage, the gelu and norm forms.
//
// Forward: y = b + h G block by block, then y += x W^T by the library torch uses, which would otherwise have filled y with
// the bias. Backward: dx = gy W by that library, then one pass over blocks of tokens for everything of rank r.
#include "tt_linear.h"

namespace efft {

namespace {

// A vector as floats; null if absent.
class Vector {
 public:
  explicit Vector(const std::optional<Tensor>& from) {
    if (!from.has_value()) return;
    panel_.emplace(torch::stable::unsqueeze(*from, 0), false);
  }
  const float* data() const { return panel_ ? panel_->data() : nullptr; }

 private:
  std::optional<Panel> panel_;
};

void describe(LowRank& op, const Stage& stage, const Tensor& D, const Tensor& G, const Vector& gamma,
              const Vector& beta) {
  op.input = stage.input;
  op.d_in = D.size(0);
  op.d_out = G.size(1);
  op.rank = D.size(1);
  op.padded_rank = (op.rank + PANEL_COLUMNS - 1) / PANEL_COLUMNS * PANEL_COLUMNS;
  op.gamma = gamma.data();
  op.beta = beta.data();
  op.eps = static_cast<float>(stage.eps);
  if (stage.input != Input::norm) return;
  op.mean = static_cast<float*>(stage.mean.data_ptr());
  op.rstd = static_cast<float*>(stage.rstd.data_ptr());
}

// Sum of the threads' parts in a fixed order, transposed for dD.
void finish(const float* parts, int64_t n_parts, int64_t rank, int64_t columns, bool transpose, const Tensor& out) {
  const Matrix to = matrix(out);
  const int64_t size = rank * columns;
  torch::stable::parallel_for(0, rank, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float total = 0;
        for (int64_t part = 0; part < n_parts; ++part) total += parts[part * size + i * columns + j];
        store_element(to, transpose ? j * rank + i : i * columns + j, total);
      }
  });
}

}  // namespace

Linear linear_forward(const Tensor& x_, const Stage& stage, const Tensor& W, const std::optional<Tensor>& b,
                      const Tensor& D, const Tensor& G) {
  const Tensor x = with_unit_rows(x_);
  const int64_t tokens = x.size(0);
  const bool plain = stage.input == Input::plain;
  Tensor y = empty(W, {tokens, W.size(0)}), h = empty(W, {tokens, D.size(1)});
  const Tensor a = plain ? x : empty(W, {tokens, W.size(1)});
  const Vector bias(b), gamma(stage.gamma), beta(stage.beta);
  const Panel down(D, false), up(G, false);
  Forward op;
  describe(op, stage, D, G, gamma, beta);
  op.x = matrix(x);
  op.a = matrix(a);
  op.y = matrix(y);
  op.h = matrix(h);
  op.b = bias.data();
  op.D = down.data();
  op.G = up.as_matrix();
  Parts(tokens).run([&](int64_t, int64_t begin, int64_t end) { kernels().forward(op, begin, end); });
  if (y.numel() > 0 && op.d_in > 0) add_product(y, a, torch::stable::transpose(W, 0, 1), true);
  return {y, h};
}

LinearBackward linear_backward(const Tensor& gy_, const std::optional<Tensor>& x_, const Stage& stage,
                               const std::optional<Tensor>& W, const std::optional<Tensor>& h_, const Tensor& D,
                               const Tensor& G, bool need_dx, bool need_dD, bool need_dG) {
  const Tensor gy = with_unit_rows(gy_);
  const int64_t tokens = gy.size(0), d_in = D.size(0), rank = D.size(1), d_out = G.size(1);
  const Vector gamma(stage.gamma), beta(stage.beta);
  const Panel Gt(G, true), Dt(D, true);
  Backward op;
  describe(op, stage, D, G, gamma, beta);
  op.gy = matrix(gy);
  op.Gt = Gt.data();
  op.Dt = Dt.as_matrix();
  op.need_dD = need_dD;
  op.need_dG = need_dG;
  const std::optional<Tensor> x = x_.has_value() ? std::optional(with_unit_rows(*x_)) : std::nullopt;
  const std::optional<Tensor> h = h_.has_value() ? std::optional(with_unit_rows(*h_)) : std::nullopt;
  op.x = x ? matrix(*x) : Matrix{nullptr, 0, op.gy.type};
  if (h) op.h = matrix(*h);

  Tensor dx = empty(x ? *x : gy, {0}), base = dx;
  if (need_dx) {
    base = empty(gy, {tokens, d_in});
    if (base.numel() > 0 && d_out > 0) add_product(base, gy, *W, false);
    dx = op.x.type == op.gy.type ? base : empty(*x, {tokens, d_in});
    op.base = matrix(base);
    op.dx = matrix(dx);
  }
  const Parts parts(tokens);
  const int64_t size_D = need_dD ? rank * d_in : 0, size_G = need_dG ? rank * d_out : 0;
  const auto sums = std::make_unique<float[]>(static_cast<size_t>(parts.count * (size_D + size_G)));
  float* const sums_G = sums.get() + parts.count * size_D;
  parts.run([&](int64_t part, int64_t begin, int64_t end) {
    kernels().backward(op, begin, end, sums.get() + part * size_D, sums_G + part * size_G);
  });
  Tensor dD = need_dD ? empty(D, {d_in, rank}) : empty(D, {0});
  Tensor dG = need_dG ? empty(G, {rank, d_out}) : empty(G, {0});
  if (need_dD) finish(sums.get(), parts.count, rank, d_in, true, dD);
  if (need_dG) finish(sums_G, parts.count, rank, d_out, false, dG);
  return {dx, dD, dG};
}

namespace {

Linear tt_linear_fwd(Tensor x, Tensor W, std::optional<Tensor> b, Tensor D, Tensor G) {
  return linear_forward(x, {}, W, b, D, G);
}

LinearBackward tt_linear_bwd(Tensor gy, std::optional<Tensor> x, std::optional<Tensor> W, std::optional<Tensor> h,
                             Tensor D, Tensor G, bool need_dx, bool need_dD, bool need_dG) {
  return linear_backward(gy, x, {}, W, h, D, G, need_dx, need_dD, need_dG);
}

STABLE_TORCH_LIBRARY_IMPL(efft, CPU, library) {
  library.impl("tt_linear_fwd.cpu", TORCH_BOX(&tt_linear_fwd));
  library.impl("tt_linear_bwd.cpu", TORCH_BOX(&tt_linear_bwd));
}

}  // namespace

}  // namespace efft
