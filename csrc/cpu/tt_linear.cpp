// efft::tt_linear_{fwd,bwd}.cpu, and what the forms behind a producer (a GELU or a layer norm) share with it.
//
// The library that torch uses computes the base product, first, because it writes a result faster than it adds to one.
// One pass over blocks of tokens then does everything of rank r: y += b + h G in forward, dx += dh D^T in backward.
// Only the forward pass behind a producer comes before the product, whose input it makes.
#include "tt_linear.h"

#include <vector>

namespace efft {

namespace {

// A vector converted to floats; its data is null if there is no vector.
class Vector {
 public:
  explicit Vector(const std::optional<Tensor>& from) {
    if (!from.has_value()) return;
    panel_.emplace(as_row(*from), Panel::Order::rows, false);
  }
  const float* data() const { return panel_ ? panel_->data() : nullptr; }

 private:
  std::optional<Panel> panel_;
};

void describe(LowRank& op, const ProducerArguments& producer, const Tensor& D, const Tensor& G, const Vector& gamma,
    const Vector& beta) {
  op.producer = producer.kind;
  op.d_in = D.size(0);
  op.d_out = G.size(1);
  op.rank = D.size(1);
  op.padded_rank = (op.rank + PANEL_COLUMNS - 1) / PANEL_COLUMNS * PANEL_COLUMNS;
  op.gamma = gamma.data();
  op.beta = beta.data();
  op.eps = static_cast<float>(producer.eps);
  if (producer.kind != Producer::norm) return;
  op.mean = static_cast<float*>(producer.mean.data_ptr());
  op.rstd = static_cast<float*>(producer.rstd.data_ptr());
}

}  // namespace

Linear linear_forward(const Tensor& x_, const ProducerArguments& producer, const Tensor& W,
    const std::optional<Tensor>& b, const Tensor& D, const Tensor& G) {
  const Tensor x = with_unit_rows(x_);
  const int64_t tokens = x.size(0);
  const bool plain = producer.kind == Producer::none;
  Tensor y = empty(W, {tokens, W.size(0)}), h = empty(W, {tokens, D.size(1)});
  const Tensor a = plain ? x : empty(W, {tokens, W.size(1)});
  const Vector bias(b), gamma(producer.gamma), beta(producer.beta);
  const Type type = type_of(W);
  const Panel down(D, Panel::Order::rows, false, type), up(G, Panel::Order::strips, false, type);
  Forward op;
  describe(op, producer, D, G, gamma, beta);
  op.x = matrix(x);
  op.a = matrix(a);
  op.y = matrix(y);
  op.h = matrix(h);
  op.b = bias.data();
  op.D = down.elements();
  op.G = up.elements();
  if (plain) {
    multiply(y, x, transposed(W), false);
    op.base = op.y;
  }
  Parts(tokens).run([&](int64_t, int64_t begin, int64_t end) { kernels().forward(op, begin, end); });
  if (!plain) multiply(y, a, transposed(W), true);
  return {y, h};
}

LinearBackward linear_backward(const Tensor& gy_, const std::optional<Tensor>& x_, const ProducerArguments& producer,
    const std::optional<Tensor>& W, const std::optional<Tensor>& h_, const Tensor& D, const Tensor& G, bool need_dx,
    bool need_dD, bool need_dG) {
  STD_TORCH_CHECK((!need_dx || W.has_value()) && (!need_dD || x_.has_value()) && (!need_dG || h_.has_value()),
      "dx needs W, dD needs x, dG needs h: one of them is missing");
  const Tensor gy = with_unit_rows(gy_);
  const int64_t tokens = gy.size(0), d_in = D.size(0), rank = D.size(1), d_out = G.size(1);
  const Vector gamma(producer.gamma), beta(producer.beta);
  const Type type = type_of(gy);
  const Panel Gt(G, Panel::Order::rows, true, type), Dt(D, Panel::Order::strips, true, type);
  Backward op;
  describe(op, producer, D, G, gamma, beta);
  op.gy = matrix(gy);
  op.Gt = Gt.elements();
  op.Dt = Dt.elements();
  op.need_dD = need_dD;
  op.need_dG = need_dG;
  const std::optional<Tensor> x = x_.has_value() ? std::optional(with_unit_rows(*x_)) : std::nullopt;
  const std::optional<Tensor> h = h_.has_value() ? std::optional(with_unit_rows(*h_)) : std::nullopt;
  op.x = x ? matrix(*x) : Matrix{nullptr, 0, op.gy.type};
  if (h) op.h = matrix(*h);

  const bool plain = producer.kind == Producer::none;
  const Tensor& like = x && !plain ? *x : gy;
  Tensor dx = need_dx ? empty(like, {tokens, d_in}) : empty(like, {0}), base = dx;
  if (need_dx) {
    if (!plain && op.x.type != op.gy.type) base = empty(gy, {tokens, d_in});
    multiply(base, gy, *W, false);
    op.base = matrix(base);
    op.dx = matrix(dx);
  }
  const Parts parts(tokens);
  const auto strips = [rank](int64_t columns) {
    return (columns + STRIP_COLUMNS - 1) / STRIP_COLUMNS * STRIP_COLUMNS * rank;
  };
  const int64_t size_D = need_dD ? strips(d_in) : 0, size_G = need_dG ? strips(d_out) : 0;
  // Kept by this thread from call to call, because the pages of fresh memory of this size would fault on every call. It
  // is as large as the largest call needs: rank (d_in + d_out) floats for each of torch's threads.
  thread_local std::vector<float> shares;
  shares.resize(std::max<size_t>(shares.size(), parts.count * (size_D + size_G) + LINE));
  float* const shares_D = at_line(shares.data());
  float* const shares_G = shares_D + parts.count * size_D;
  parts.run([&](int64_t part, int64_t begin, int64_t end) {
    kernels().backward(op, begin, end, shares_D + part * size_D, shares_G + part * size_G);
  });
  Tensor dD = need_dD ? empty(D, {d_in, rank}) : empty(D, {0});
  Tensor dG = need_dG ? empty(G, {rank, d_out}) : empty(G, {0});
  if (tokens == 0) {
    torch::stable::zero_(dD);
    torch::stable::zero_(dG);
    return {dx, dD, dG};
  }
  // Summed in the order of the threads, so that every run gives the same bits.
  if (need_dD) gather({{shares_D, 0, Type::float32}, parts.count, size_D, rank, d_in, 1, true, matrix(dD)});
  if (need_dG) gather({{shares_G, 0, Type::float32}, parts.count, size_G, rank, d_out, 1, false, matrix(dG)});
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
