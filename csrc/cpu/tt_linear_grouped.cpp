// Implements efft::tt_linear_grouped{,_fwd,_bwd}.cpu, a linear layer in which each sample has the factors of its own
// adapter. The operator tt_linear_grouped, which is used for inference, computes the product with the frozen weight for
// all samples together, and then adds the update of each sample. The operators tt_linear_grouped_fwd and _bwd are used
// for training, and the former also for inference if each adapter has its own bias. They compute consecutive samples of
// one adapter together, exactly as a call of tt_linear with only these samples computes them. If the samples of an
// adapter are not consecutive, the backward pass first orders the samples by adapter.
#include <cstring>

#include "tt_linear.h"

namespace efft {

namespace {

void check_ids(const int64_t* ids, int64_t samples, int64_t n_adapters) {
  for (int64_t i = 0; i < samples; ++i)
    STD_TORCH_CHECK(ids[i] < n_adapters, "tt_linear_grouped: there are ", n_adapters, " adapters, got index ", ids[i]);
}

Tensor tt_linear_grouped(Tensor x_, Tensor W, std::optional<Tensor> b, Tensor D, Tensor G, Tensor adapter_) {
  const Tensor x = torch::stable::contiguous(x_), adapter = torch::stable::contiguous(adapter_);
  const int64_t samples = x.size(0), tokens = x.size(1), d_in = x.size(2), d_out = W.size(0);
  Tensor y = empty(W, {samples, tokens, d_out});
  multiply(view(y, {samples * tokens, d_out}, {d_out, 1}), view(x, {samples * tokens, d_in}, {d_in, 1}), transposed(W),
      false);
  std::optional<Panel> bias;
  if (b.has_value()) bias.emplace(as_row(*b), Panel::Order::rows, false);
  const auto* ids = static_cast<const int64_t*>(adapter.data_ptr());
  check_ids(ids, samples, D.size(0));
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
      if (ids[i] < 0) {  // the sample has no adapter, and op keeps rank 0
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

// Consecutive samples of one adapter, which are rows begin .. begin + rows - 1 of a matrix [samples * tokens, ...]. The
// adapter is -1 if the samples have none.
struct Run {
  int64_t adapter, begin, rows;
};

// Divides the samples, whose adapters are `ids`, into runs. Each sample has `tokens` rows.
std::vector<Run> runs_of(const std::vector<int64_t>& ids, int64_t tokens) {
  std::vector<Run> runs;
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t adapter = std::max<int64_t>(ids[i], -1);
    if (runs.empty() || runs.back().adapter != adapter) runs.push_back({adapter, static_cast<int64_t>(i) * tokens, 0});
    runs.back().rows += tokens;
  }
  return runs;
}

// Returns the rows of a run as a view of a contiguous tensor [samples, tokens, columns].
Tensor rows_of(const Tensor& t, const Run& run) {
  const int64_t columns = t.size(2);
  return view(t, {run.rows, columns}, {columns, 1}, run.begin * columns);
}

// Returns entry i of the first dimension of a tensor.
Tensor entry(const Tensor& t, int64_t i) {
  return torch::stable::select(t, 0, i);
}

// Returns the adapter indices, and raises an error if one of them is too large.
std::vector<int64_t> checked_ids(const Tensor& adapter_, int64_t n_adapters) {
  const Tensor adapter = torch::stable::contiguous(adapter_);
  const auto* ids = static_cast<const int64_t*>(adapter.data_ptr());
  check_ids(ids, adapter.size(0), n_adapters);
  return {ids, ids + adapter.size(0)};
}

Linear tt_linear_grouped_fwd(Tensor x_, Tensor W, std::optional<Tensor> b, Tensor D, Tensor G, Tensor adapter) {
  const Tensor x = torch::stable::contiguous(x_);
  const int64_t samples = x.size(0), tokens = x.size(1);
  const Tensor y = empty(W, {samples, tokens, W.size(0)}), h = empty(W, {samples, tokens, D.size(2)});
  const bool own_bias = b.has_value() && b->dim() == 2;
  // Samples without an adapter have factors of rank 0.
  const Tensor no_D = empty(D, {D.size(1), 0}), no_G = empty(G, {0, G.size(2)});
  for (const Run& run : runs_of(checked_ids(adapter, D.size(0)), tokens)) {
    const Tensor x_run = rows_of(x, run), y_run = rows_of(y, run);
    Tensor h_run = rows_of(h, run);
    if (run.adapter < 0) {
      torch::stable::zero_(h_run);
      const Linear into{y_run, empty(W, {run.rows, 0})};
      linear_forward(x_run, {}, W, own_bias ? std::nullopt : b, no_D, no_G, &into);
      continue;
    }
    const Linear into{y_run, h_run};
    linear_forward(x_run, {}, W, own_bias ? std::optional(entry(*b, run.adapter)) : b, entry(D, run.adapter),
        entry(G, run.adapter), &into);
  }
  return {y, h};
}

// Copies the samples of `from` [samples, tokens, columns] to `to` in another order; both tensors are contiguous. Sample
// order[i] of `from` is copied to sample i of `to`. If `back` is set, sample i of `from` is copied to sample order[i]
// of `to`.
void copy_samples(const Tensor& to, const Tensor& from, const std::vector<int64_t>& order, bool back) {
  const size_t bytes = static_cast<size_t>(from.size(1) * from.size(2)) * from.element_size();
  auto* const target = static_cast<char*>(to.data_ptr());
  const auto* const source = static_cast<const char*>(from.data_ptr());
  for (size_t i = 0; i < order.size(); ++i) {
    const auto other = static_cast<size_t>(order[i]);
    std::memcpy(target + (back ? other : i) * bytes, source + (back ? i : other) * bytes, bytes);
  }
}

// Orders the samples so that every adapter has only one run. The gradients of the adapter are then computed in one call
// and rounded once. If the samples of every adapter are already consecutive, nothing is copied. Otherwise `ordered`
// copies the samples in the order of their adapters, and `restored` copies them back to the original order.
class Together {
 public:
  Together(const std::vector<int64_t>& ids, int64_t tokens) : order_(ids.size()) {
    for (size_t i = 0; i < ids.size(); ++i) order_[i] = static_cast<int64_t>(i);
    runs_ = runs_of(ids, tokens);
    std::vector<int64_t> adapters, sorted;
    adapters.reserve(runs_.size());
    for (const Run& run : runs_) adapters.push_back(run.adapter);
    std::sort(adapters.begin(), adapters.end());
    moves_ = std::adjacent_find(adapters.begin(), adapters.end()) != adapters.end();
    if (!moves_) return;
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    sorted.reserve(ids.size());
    for (const int64_t i : order_) sorted.push_back(ids[i]);
    runs_ = runs_of(sorted, tokens);
  }
  const std::vector<Run>& runs() const { return runs_; }
  std::optional<Tensor> ordered(const std::optional<Tensor>& t) const {
    if (!t.has_value()) return std::nullopt;
    Tensor from = torch::stable::contiguous(*t);
    if (!moves_) return from;
    Tensor to = empty(from, {from.size(0), from.size(1), from.size(2)});
    copy_samples(to, from, order_, false);
    return to;
  }
  Tensor restored(const Tensor& t) const {
    if (!moves_) return t;
    Tensor to = empty(t, {t.size(0), t.size(1), t.size(2)});
    copy_samples(to, t, order_, true);
    return to;
  }

 private:
  std::vector<int64_t> order_;
  std::vector<Run> runs_;
  bool moves_ = false;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> tt_linear_grouped_bwd(Tensor gy_, std::optional<Tensor> x_,
    std::optional<Tensor> W, std::optional<Tensor> h_, Tensor D, Tensor G, Tensor adapter, bool need_dx, bool need_dD,
    bool need_dG, bool need_db) {
  check_operands({need_dx, need_dD, need_dG, need_db}, W, x_, h_);
  const int64_t n = D.size(0), d_in = D.size(1), rank = D.size(2), d_out = G.size(2);
  const Together together(checked_ids(adapter, n), gy_.size(1));
  const Tensor gy = together.ordered(gy_).value();
  const std::optional<Tensor> x = together.ordered(need_dD ? x_ : std::nullopt),
                              h = together.ordered(need_dG ? h_ : std::nullopt);
  const Tensor none = empty(gy, {0});
  const Tensor dx = need_dx ? empty(gy, {gy.size(0), gy.size(1), d_in}) : none;
  Tensor dD = need_dD ? empty(D, {n, d_in, rank}) : empty(D, {0}),
         dG = need_dG ? empty(G, {n, rank, d_out}) : empty(G, {0});
  Tensor db = need_db ? empty(gy, {n, d_out}, ScalarType::Float) : empty(gy, {0}, ScalarType::Float);
  std::vector<bool> seen(n);
  for (const Run& run : together.runs()) {
    const Tensor gy_run = rows_of(gy, run), dx_run = need_dx ? rows_of(dx, run) : none;
    if (run.adapter < 0) {
      if (need_dx) multiply(dx_run, gy_run, W.value(), false);
      continue;
    }
    seen[run.adapter] = true;
    const auto of = [&](const Tensor& t, bool needed) { return needed ? entry(t, run.adapter) : t; };
    const LinearBackward into{dx_run, of(dD, need_dD), of(dG, need_dG), of(db, need_db), none, none};
    linear_backward(gy_run, x ? std::optional(rows_of(*x, run)) : std::nullopt, {}, W,
        h ? std::optional(rows_of(*h, run)) : std::nullopt, entry(D, run.adapter), entry(G, run.adapter),
        {need_dx, need_dD, need_dG, need_db}, &into);
  }
  for (int64_t i = 0; i < n; ++i) {
    if (seen[i]) continue;
    for (const auto& [sums, needed] : {std::pair{&dD, need_dD}, {&dG, need_dG}, {&db, need_db}}) {
      if (!needed) continue;
      Tensor of_adapter = entry(*sums, i);
      torch::stable::zero_(of_adapter);
    }
  }
  return {need_dx ? together.restored(dx) : dx, dD, dG, db};
}

STABLE_TORCH_LIBRARY_IMPL(efft, CPU, library) {
  library.impl("tt_linear_grouped.cpu", TORCH_BOX(&tt_linear_grouped));
  library.impl("tt_linear_grouped_fwd.cpu", TORCH_BOX(&tt_linear_grouped_fwd));
  library.impl("tt_linear_grouped_bwd.cpu", TORCH_BOX(&tt_linear_grouped_bwd));
}

}  // namespace

}  // namespace efft
