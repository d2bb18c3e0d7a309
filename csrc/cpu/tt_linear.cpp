// Implements efft::tt_linear_{fwd,bwd}.cpu, and the functions that this op shares with tt_gelu_linear, tt_norm_linear
// and tt_mlp. These include a producer, the GELU or layer norm that runs directly before a layer.
//
// Torch computes the base product (the product with the frozen weight), which is x W^T in the forward pass and gy W in
// the backward pass. The base product comes first, because torch writes a new product faster than it adds a product to
// an existing tensor. Then our kernels process the tokens and add the rank-r products: y += b + h G in the forward
// pass, and dx += dh D^T in the backward pass. The forward pass with a producer has the reverse order, because our
// kernels then also compute a, the output of the producer, which is the input of the base product. In tt_mlp, the GELU
// reads the output of another layer. The same pass over the tokens then also adds b + h G of that layer to its output,
// and therefore the base product of that layer need not be added to an existing tensor.
#include "tt_linear.h"

#include <vector>

namespace efft {

namespace {

// An optional vector, converted to floats. data() is null if the vector is absent.
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

// Fills the fields of `op` that the forward and backward passes set in the same way: the producer, its parameters and
// statistics, and the sizes of the factors.
void describe(LowRank& op, const ProducerArguments& producer, const Tensor& D, int64_t d_out, const Vector& gamma,
    const Vector& beta) {
  op.producer = producer.kind;
  op.d_in = D.size(0);
  op.d_out = d_out;
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

void check_operands(
    const Needs& need, const std::optional<Tensor>& W, const std::optional<Tensor>& x, const std::optional<Tensor>& h) {
  const auto check = [](bool needed, const char* gradient, const std::optional<Tensor>& operand, const char* name) {
    STD_TORCH_CHECK(!needed || operand.has_value(), "expected ", name, " because ", gradient,
        " is needed, got None; pass ", name, " or do not request ", gradient);
  };
  check(need.dx, "dx", W, "W");
  check(need.dgamma, "dgamma", W, "W");
  check(need.dbeta, "dbeta", W, "W");
  check(need.dD, "dD", x, "x");
  check(need.dG, "dG", h, "h");
}

ProducerArguments gelu(const std::string& approximate) {
  ProducerArguments producer;
  producer.kind = approximate == "tanh" ? Producer::gelu_tanh : Producer::gelu;
  return producer;
}

Linear project(const Tensor& x_, const ProducerArguments& producer, const Tensor& like, const Tensor& D) {
  const Tensor x = with_unit_rows(x_);
  const int64_t tokens = x.size(0);
  const Tensor a = producer.kind == Producer::none ? x : empty(like, {tokens, D.size(0)});
  const Tensor h = empty(like, {tokens, D.size(1)});
  const Vector gamma(producer.gamma), beta(producer.beta);
  const Panel down(D, Panel::Order::rows, false, type_of(like));
  Forward op;
  describe(op, producer, D, 0, gamma, beta);
  op.x = matrix(x);
  op.a = matrix(a);
  op.h = matrix(h);
  op.y.type = type_of(like);
  op.D = down.elements();
  Parts(tokens).run([&](int64_t, int64_t begin, int64_t end) { kernels().forward(op, begin, end); });
  return {a, h};
}

Linear linear_forward(const Tensor& x_, const ProducerArguments& producer, const Tensor& W,
    const std::optional<Tensor>& b, const Tensor& D, const Tensor& G, const Linear* into,
    const PendingOutput* pending) {
  const Tensor x = with_unit_rows(x_);
  const int64_t tokens = x.size(0);
  const bool plain = producer.kind == Producer::none;
  const auto [y, h] = into ? *into : Linear{empty(W, {tokens, W.size(0)}), empty(W, {tokens, D.size(1)})};
  const Tensor a = plain ? x : empty(W, {tokens, W.size(1)});
  const Vector bias(b), gamma(producer.gamma), beta(producer.beta), pending_bias(pending ? pending->b : std::nullopt);
  const Type type = type_of(W);
  const Panel down(D, Panel::Order::rows, false, type), up(G, Panel::Order::strips, false, type);
  Forward op;
  describe(op, producer, D, G.size(1), gamma, beta);
  op.x = matrix(x);
  op.a = matrix(a);
  op.y = matrix(y);
  op.h = matrix(h);
  op.b = bias.data();
  op.D = down.elements();
  op.G = up.elements();
  std::optional<Panel> pending_up;
  if (pending) {
    pending_up.emplace(pending->G, Panel::Order::strips, false, type);
    op.pending = {pending_bias.data(), matrix(pending->h), pending->G.size(0), pending_up->elements()};
  }
  if (plain) {
    multiply(y, x, transposed(W), false);
    op.base = op.y;
  }
  Parts(tokens).run([&](int64_t, int64_t begin, int64_t end) { kernels().forward(op, begin, end); });
  if (!plain) multiply(y, a, transposed(W), true);
  return {y, h};
}

LinearBackward linear_backward(const Tensor& gy_, const std::optional<Tensor>& x_, const ProducerArguments& producer,
    const std::optional<Tensor>& W, const std::optional<Tensor>& h_, const Tensor& D, const Tensor& G,
    const Needs& need, const LinearBackward* into) {
  const bool need_norm = need.dgamma || need.dbeta, need_da = need.dx || need_norm;
  check_operands(need, W, x_, h_);
  const Tensor gy = with_unit_rows(gy_);
  const int64_t tokens = gy.size(0), d_in = D.size(0), rank = D.size(1), d_out = G.size(1);
  const Vector gamma(producer.gamma), beta(producer.beta);
  const Type type = type_of(gy);
  const Panel Gt(G, Panel::Order::rows, true, type), Dt(D, Panel::Order::strips, true, type);
  Backward op;
  describe(op, producer, D, G.size(1), gamma, beta);
  op.gy = matrix(gy);
  op.Gt = Gt.elements();
  op.Dt = Dt.elements();
  const std::optional<Tensor> x = x_.has_value() ? std::optional(with_unit_rows(*x_)) : std::nullopt;
  const std::optional<Tensor> h = h_.has_value() ? std::optional(with_unit_rows(*h_)) : std::nullopt;
  op.x = x ? matrix(*x) : Matrix{nullptr, 0, op.gy.type};
  if (h) op.h = matrix(*h);

  const bool plain = producer.kind == Producer::none;
  const Tensor& like = x && !plain ? *x : gy;
  const auto gradient = [](bool needed, const Tensor& of, int64_t rows, int64_t columns, auto... dtype) {
    return needed ? empty(of, {rows, columns}, dtype...) : empty(of, {0}, dtype...);
  };
  Tensor dx = into ? into->dx : gradient(need.dx, like, tokens, d_in), base = dx;
  if (need_da) {
    if (!need.dx || (!plain && op.x.type != op.gy.type)) base = empty(gy, {tokens, d_in});
    multiply(base, gy, W.value(), false);
    op.base = matrix(base);
    if (need.dx) op.dx = matrix(dx);
  }
  Tensor dD = into ? into->dD : gradient(need.dD, D, d_in, rank, ScalarType::Float);
  Tensor dG = into ? into->dG : gradient(need.dG, G, rank, d_out, ScalarType::Float);
  Tensor db = into ? into->db : empty(gy, {need.db ? d_out : 0}, ScalarType::Float);
  Tensor dgamma = empty(producer.gamma ? *producer.gamma : like, {need.dgamma ? d_in : 0});
  Tensor dbeta = empty(producer.beta ? *producer.beta : like, {need.dbeta ? d_in : 0});
  if (tokens == 0) {
    for (Tensor* sum : {&dD, &dG, &db, &dgamma, &dbeta}) torch::stable::zero_(*sum);
    return {dx, dD, dG, db, dgamma, dbeta};
  }
  const Parts parts(tokens);
  const auto strips = [](bool needed, int64_t rows, int64_t columns) {
    return needed ? (columns + STRIP_COLUMNS - 1) / STRIP_COLUMNS * STRIP_COLUMNS * rows : 0;
  };
  const int64_t size_D = strips(need.dD, rank, d_in), size_G = strips(need.dG, rank, d_out);
  const int64_t size_b = strips(need.db, 1, d_out), size_norm = strips(need_norm, 1, d_in);
  // This thread keeps the memory for later calls, because fresh memory of this size would cause page faults in every
  // call. The memory has the size that the largest call so far needed. A call that needs all gradients needs about
  // rank (d_in + d_out) floats for each of torch's threads.
  thread_local std::vector<float> room;
  room.resize(std::max<size_t>(room.size(), parts.count * (size_D + size_G + size_b + 2 * size_norm) + LINE));
  float* const shares_D = at_line(room.data());
  float* const shares_G = shares_D + parts.count * size_D;
  float* const shares_b = shares_G + parts.count * size_G;
  float* const shares_gamma = shares_b + parts.count * size_b;
  float* const shares_beta = shares_gamma + parts.count * size_norm;
  parts.run([&](int64_t part, int64_t begin, int64_t end) {
    Shares of;
    if (need.dD) of.dDt = shares_D + part * size_D;
    if (need.dG) of.dG = shares_G + part * size_G;
    if (need.db) of.db = shares_b + part * size_b;
    if (need_norm) {
      of.dgamma = shares_gamma + part * size_norm;
      of.dbeta = shares_beta + part * size_norm;
    }
    kernels().backward(op, begin, end, of);
  });
  // Shares are added in the order of the parts. Therefore every call with the same number of threads returns exactly
  // the same result.
  const auto total = [&parts](
                         float* shares, int64_t size, int64_t rows, int64_t columns, bool transpose, const Tensor& to) {
    gather({{shares, 0, Type::float32}, parts.count, size, rows, columns, 1, transpose, matrix(to)});
  };
  if (need.dD) total(shares_D, size_D, rank, d_in, true, dD);
  if (need.dG) total(shares_G, size_G, rank, d_out, false, dG);
  if (need.db) total(shares_b, size_b, 1, d_out, false, as_row(db));
  if (need.dgamma) total(shares_gamma, size_norm, 1, d_in, false, as_row(dgamma));
  if (need.dbeta) total(shares_beta, size_norm, 1, d_in, false, as_row(dbeta));
  return {dx, dD, dG, db, dgamma, dbeta};
}

namespace {

Linear tt_linear_fwd(Tensor x, Tensor W, std::optional<Tensor> b, Tensor D, Tensor G) {
  const auto [y, h] = linear_forward(as_rows(x), {}, W, b, D, G);
  return {with_leading_sizes(y, x), h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tt_linear_bwd(Tensor gy, std::optional<Tensor> x, std::optional<Tensor> W,
    std::optional<Tensor> h, Tensor D, Tensor G, bool need_dx, bool need_dD, bool need_dG, bool need_db) {
  const std::optional<Tensor> rows = x.has_value() ? std::optional(as_rows(*x)) : std::nullopt;
  const LinearBackward grads = linear_backward(as_rows(gy), rows, {}, W, h, D, G, {need_dx, need_dD, need_dG, need_db});
  return {need_dx ? with_leading_sizes(grads.dx, gy) : grads.dx, grads.dD, grads.dG, grads.db};
}

STABLE_TORCH_LIBRARY_IMPL(efft, CPU, library) {
  library.impl("tt_linear_fwd.cpu", TORCH_BOX(&tt_linear_fwd));
  library.impl("tt_linear_bwd.cpu", TORCH_BOX(&tt_linear_bwd));
}

}  // namespace

}  // namespace efft
