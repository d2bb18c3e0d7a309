// Implements efft::tt_linear_{fwd,bwd}.cuda, and the functions that this op shares with tt_gelu_linear, tt_norm_linear
// and tt_mlp. These include a producer, the GELU or layer norm that runs directly before the layer.
//
// The forward pass launches the kernel of the producer, whose output is a (without a producer, a is x). Then it
// computes h = a D and y = a W^T + b + h G. Either one kernel computes both, or a separate kernel computes h first. The
// backward pass uses the same kernels to compute dh = gy G^T and the gradient of a, gy W + dh D^T. Then it launches the
// backward kernel of the producer, and finally calls reduce_tokens for dG and dD. If the bias or the norm is trained,
// torch computes the gradients of their parameters, which are sums over the tokens. The second and the third generation
// of kernels, which EFFT_SM90_GENERATION selects on compute capability 9.0, compute these gradients in reduce_tokens
// instead. The products of the third generation can also apply a GELU to their results, so that the separate kernels
// for it are not needed: in the forward pass of the layer before the GELU, and in the backward pass of the layer after
// it.
#include "tt_linear.h"

#include <array>

namespace efft {

namespace {

Norm norm_of(const LayerProducer& producer, const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta) {
  Norm norm;
  norm.gamma = vector_of(gamma);
  norm.beta = vector_of(beta);
  norm.eps = static_cast<float>(producer.eps);
  if (producer.mean) norm.mean = static_cast<float*>(producer.mean->data_ptr());
  if (producer.rstd) norm.rstd = static_cast<float*>(producer.rstd->data_ptr());
  return norm;
}

std::optional<Tensor> whole(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional(torch::stable::contiguous(*t)) : std::nullopt;
}

// Returns x with aligned rows, converted to another type if necessary. Without a producer, x is converted to the type
// of the products. A producer can read this type and float. If x has any other type, it is converted to float.
Tensor with_readable_rows(
    const Tensor& x, const LayerProducer& producer, ScalarType product, const Launches& launches) {
  const bool own = producer.kind != Producer::none && x.scalar_type() != product;
  return with_aligned_rows(x, own ? ScalarType::Float : product, launches);
}

// Computes h = a P in a separate kernel, where P is stored transposed.
void make_h(const Tensor& h, const Tensor& a, const Tensor& P, const Launches& launches) {
  Project op;
  op.M = a.size(0);
  op.K = a.size(1);
  op.R = P.size(0);
  op.A = matrix(a);
  op.P = matrix(P);
  op.H = matrix(h);
  check(project(op, launches.stream()));
}

Tensor multiplied(const Tensor& left, const Tensor& right) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(left), torch::stable::detail::from(right)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns the sum of the rows, computed in float and converted to `type`.
Tensor sum_of_rows(const Tensor& of, ScalarType type) {
  constexpr int64_t rows = 0;
  const Tensor sum =
      torch::stable::sum(of, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1), false, ScalarType::Float);
  return torch::stable::to(sum, type);
}

// Returns (x - mean) rstd in float, which the norm multiplies by gamma.
Tensor standardized(const Tensor& x, const LayerProducer& producer) {
  const Tensor centered =
      torch::stable::subtract(torch::stable::to(x, ScalarType::Float), torch::stable::unsqueeze(*producer.mean, 1));
  return multiplied(centered, torch::stable::unsqueeze(*producer.rstd, 1));
}

}  // namespace

Linear linear_forward(const Tensor& x_, const LayerProducer& producer, const Tensor& W, const std::optional<Tensor>& b_,
    const Tensor& D, const Tensor& G, GeluAfterLayer* gelu) {
  const Launches launches(x_);
  const ScalarType type = W.scalar_type();
  const std::optional<Tensor> b = whole(b_), gamma = whole(producer.gamma), beta = whole(producer.beta);
  const Tensor x = with_readable_rows(x_, producer, type, launches),
               P = with_aligned_rows(transposed(D), type, launches);
  const Right right(transposed(W), launches);
  const Tensor tail = right.tail(G, launches);
  const bool plain = producer.kind == Producer::none;

  const int64_t tokens = x.size(0), d_in = x.size(1), rank = D.size(1);
  const Tensor h = empty_rows(W, {tokens}, rank, type), a = plain ? x : empty_rows(W, {tokens}, d_in, type);
  if (!plain) {
    Produce op;
    op.rows = tokens;
    op.columns = d_in;
    op.x = matrix(x);
    op.out = matrix(a);
    op.producer = producer.kind;
    op.norm = norm_of(producer, gamma, beta);
    check(produce(op, launches.stream()));
  }
  const Tensor y = empty(W, {tokens, W.size(0)});
  LowRankGemm product;
  product.M = tokens;
  product.N = W.size(0);
  product.K = d_in;
  product.R = rank;
  product.A = matrix(a);
  product.B = matrix(right.rows);
  product.H = matrix(h);
  product.T = matrix(tail);
  product.transposed = right.is_transposed;
  product.bias = vector_of(b);
  product.Y = matrix(y);
  if (gelu) {
    product.gelu.which = gelu->kind;
    if (lowrank_gemm_computes_gelu(product)) {
      gelu->output = empty(W, {tokens, W.size(0)});
      product.gelu.a = matrix(*gelu->output);
    } else {
      product.gelu.which = Producer::none;
    }
  }
  if (lowrank_gemm_makes_h(product)) {
    product.P = matrix(P);
  } else {
    make_h(h, a, P, launches);
  }
  check(lowrank_gemm(product, launches.stream()));
  return {y, torch::stable::contiguous(h)};
}

LinearBackward linear_backward(const Tensor& gy_, const std::optional<Tensor>& x_, const LayerProducer& producer,
    const std::optional<Tensor>& W, const std::optional<Tensor>& h_, const Tensor& D, const Tensor& G,
    const Needs& need, TokenSums* later) {
  const bool need_da = need.dx || need.dgamma || need.dbeta;
  const Launches launches(gy_);
  const ScalarType type = gy_.scalar_type();
  const Tensor gy = with_aligned_rows(gy_, type, launches);
  const std::optional<Tensor> gamma = whole(producer.gamma), beta = whole(producer.beta);
  const bool reads_x = x_.has_value() && (need.dD || (need_da && producer.kind != Producer::none));
  const Tensor x = reads_x ? with_readable_rows(*x_, producer, type, launches) : gy;
  const Tensor like_x = x_.has_value() ? *x_ : gy_;
  const int64_t tokens = gy.size(0), d_in = D.size(0), d_out = G.size(1), rank = D.size(1);

  const Tensor dh = empty_rows(gy, {need_da || need.dD ? tokens : 0}, rank, type);
  const Tensor P = need_da || need.dD ? with_aligned_rows(G, type, launches) : G;

  // a is the input of the products, and da is its gradient. Without a producer, a is x and da is dx. If the product
  // also computes the backward pass of a GELU, da is not written, and the product writes dx and a instead.
  const bool plain = producer.kind == Producer::none;
  const Tensor dx = need.dx ? empty(like_x, {tokens, d_in}) : empty(like_x, {0});
  Tensor a = x, da = dx;
  bool has_gelu = false;
  if (!plain && need.dD) a = empty_rows(gy, {tokens}, d_in, type);
  if (need_da) {
    const Right right(*W, launches);
    const Tensor tail = right.tail(transposed(D), launches);
    LowRankGemm product;
    product.M = tokens;
    product.N = d_in;
    product.K = d_out;
    product.R = rank;
    product.A = matrix(gy);
    product.B = matrix(right.rows);
    product.H = matrix(dh);
    product.T = matrix(tail);
    product.transposed = right.is_transposed;
    if (!plain && producer.kind != Producer::norm) {
      product.Y = matrix(dx);
      product.gelu = {producer.kind, matrix(x), need.dD ? matrix(a) : Matrix{}};
      has_gelu = lowrank_gemm_computes_gelu(product);
    }
    if (!has_gelu) {
      if (!plain) da = empty_rows(gy, {tokens}, d_in, type);
      product.Y = matrix(da);
      product.gelu = {};
    }
    if (lowrank_gemm_makes_h(product))
      product.P = matrix(P);
    else
      make_h(dh, gy, P, launches);
    check(lowrank_gemm(product, launches.stream()));
  } else if (need.dD) {
    make_h(dh, gy, P, launches);
  }
  if (!plain && !has_gelu && (need.dx || need.dD)) {
    ProduceBackward op;
    op.rows = tokens;
    op.columns = d_in;
    op.x = matrix(x);
    if (need.dx) {
      op.dout = matrix(da);
      op.dx = matrix(dx);
    }
    if (need.dD) op.out = matrix(a);
    op.type = type_of(type);
    op.producer = producer.kind;
    op.norm = norm_of(producer, gamma, beta);
    check(produce_backward(op, launches.stream()));
  }

  const Tensor dD = need.dD ? empty(D, {d_in, rank}, ScalarType::Float) : empty(D, {0}, ScalarType::Float);
  const Tensor dG = need.dG ? empty(G, {rank, d_out}, ScalarType::Float) : empty(G, {0}, ScalarType::Float);
  ReduceTokens sums;
  sums.tokens = tokens;
  sums.rank = rank;
  const Tensor h = need.dG ? with_aligned_rows(*h_, type, launches) : dh;
  if (need.dG) {
    sums.d_out = d_out;
    sums.gy = matrix(gy);
    sums.h = matrix(h);
    sums.dG = dG.data_ptr();
    sums.factors_G = type_of(dG);
  }
  if (need.dD) {
    sums.d_in = d_in;
    sums.x = matrix(a);
    sums.dh = matrix(dh);
    sums.dD = dD.data_ptr();
    sums.factors_D = type_of(dD);
  }
  // From the second generation on, reduce_tokens computes the gradients of the bias and the norm. Otherwise torch
  // computes them below.
  const bool finishes = reduce_tokens_finishes();
  Tensor db = empty(gy, {finishes && need.db ? d_out : 0}, ScalarType::Float);
  Tensor dgamma = empty(producer.gamma ? *producer.gamma : like_x, {finishes && need.dgamma ? d_in : 0}),
         dbeta = empty(producer.beta ? *producer.beta : like_x, {finishes && need.dbeta ? d_in : 0});
  if (finishes && need.db) {
    sums.summed_out = d_out;
    sums.gy = matrix(gy);
    sums.db = static_cast<float*>(db.data_ptr());
  }
  if (finishes && (need.dgamma || need.dbeta)) {
    sums.summed_in = d_in;
    sums.da = matrix(da);
    sums.z = matrix(x);
    sums.norm = norm_of(producer, gamma, beta);
    if (need.dgamma) sums.dgamma = dgamma.data_ptr();
    if (need.dbeta) sums.dbeta = dbeta.data_ptr();
    sums.type_of_dgamma = type_of(dgamma);
    sums.type_of_dbeta = type_of(dbeta);
  }
  if (finishes && later) {
    later->all.of[later->all.count++] = sums;
    later->operands.insert(later->operands.end(), {gy, x, a, da, h, dh});
    launches.stream();  // launches the copies of operands, which a later launch will read
  } else {
    sums.splits = reduce_tokens_splits(sums);
    const int64_t size = finishes ? 0 : sums.splits * rank * (sums.d_out + sums.d_in);
    const Tensor partials = empty(gy, {size}, ScalarType::Float);
    sums.partials = static_cast<float*>(partials.data_ptr());
    check(reduce_tokens({{sums}, 1}, launches.stream()));
  }
  if (!finishes) {
    if (need.db) db = sum_of_rows(gy, ScalarType::Float);
    if (need.dgamma) dgamma = sum_of_rows(multiplied(da, standardized(*x_, producer)), producer.gamma->scalar_type());
    if (need.dbeta) dbeta = sum_of_rows(da, producer.beta->scalar_type());
  }
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

STABLE_TORCH_LIBRARY_IMPL(efft, CUDA, library) {
  library.impl("tt_linear_fwd.cuda", TORCH_BOX(&tt_linear_fwd));
  library.impl("tt_linear_bwd.cuda", TORCH_BOX(&tt_linear_bwd));
}

}  // namespace

}  // namespace efft
