// Implements efft::tt_contract_{fwd,bwd}.cpu, the contraction of a tensor train: every layer has cores C, and each core
// is multiplied by V, which all layers share (see Contraction in kernels.h). To compute the result G and the gradient
// dC, the threads process different layers and cores in parallel. To compute dV, they process different blocks of
// columns.
#include <tuple>

#include "tensors.h"

namespace efft {

namespace {

using Mask = std::optional<Tensor>;

Mask whole(const Mask& mask) {
  return mask.has_value() ? Mask(torch::stable::contiguous(*mask)) : std::nullopt;
}

const bool* at(const Mask& mask, int64_t offset) {
  return mask.has_value() ? static_cast<const bool*>(mask->data_ptr()) + offset : nullptr;
}

// The contiguous factors and masks of a tensor train. part(l, c) returns the contraction for layer l and core c.
struct Train {
  Tensor C, V, G;  // G is dG in the backward pass
  Mask keep_C, keep_V;
  double scale;
  int64_t n_layers = C.size(0), n_cores = C.size(1), r1 = C.size(2), r2 = C.size(3), d_out = V.size(1);

  Contraction part(int64_t l, int64_t c) const {
    const int64_t core = (l * n_cores + c) * r1 * r2;
    Contraction op;
    op.rows = r1;
    op.depth = r2;
    op.columns = d_out;
    op.C = matrix(C, core);
    op.V = matrix(V);
    op.G = {matrix(G, l * r1 * n_cores * d_out + c * d_out).data, n_cores * d_out, type_of(G)};
    op.keep_C = at(keep_C, core);
    op.keep_V = at(keep_V, l * r2 * d_out);
    op.scale = static_cast<float>(scale);
    return op;
  }
};

Tensor tt_contract_fwd(Tensor C, Tensor V, Mask keep_C, Mask keep_V, double scale) {
  using torch::stable::contiguous;
  const Tensor G = empty(C, {C.size(0), C.size(2), C.size(1) * V.size(1)});
  const Train train{contiguous(C), contiguous(V), G, whole(keep_C), whole(keep_V), scale};
  torch::stable::parallel_for(0, train.n_layers * train.n_cores, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernels().contract(train.part(i / train.n_cores, i % train.n_cores));
  });
  return G;
}

std::tuple<Tensor, Tensor> tt_contract_bwd(
    Tensor dG, Tensor C, Tensor V, Mask keep_C, Mask keep_V, double scale, bool need_dC, bool need_dV) {
  using torch::stable::contiguous;
  const Train train{contiguous(C), contiguous(V), contiguous(dG), whole(keep_C), whole(keep_V), scale};
  const int64_t n_parts = train.n_layers * train.n_cores;
  Tensor dC = need_dC ? empty(C, {train.n_layers, train.n_cores, train.r1, train.r2}) : empty(C, {0});
  Tensor dV = need_dV ? empty(V, {train.r2, train.d_out}) : empty(V, {0});
  if (need_dC)
    torch::stable::parallel_for(0, n_parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Matrix to{matrix(dC, i * train.r1 * train.r2).data, train.r2, type_of(dC)};
        kernels().contract_dC(train.part(i / train.n_cores, i % train.n_cores), to);
      }
    });
  if (need_dV) {  // a thread sums its blocks of columns over layers and cores in a fixed order
    constexpr int64_t width = 192;
    const Matrix to = matrix(dV);
    torch::stable::parallel_for(0, (train.d_out + width - 1) / width, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * width, end = std::min(train.d_out, begin + width);
        std::unique_ptr<float[]> sums(new float[train.r2 * (end - begin)]());
        for (int64_t i = 0; i < n_parts; ++i)
          kernels().contract_dV(train.part(i / train.n_cores, i % train.n_cores), begin, end, sums.get());
        // The pointer is shifted by `begin`, because gather counts columns from the first column of dV.
        const Matrix from{sums.get() - begin, end - begin, Type::float32};
        kernels().gather({from, 1, 0, train.r2, train.d_out, 1, false, to}, begin, end);
      }
    });
  }
  return {dC, dV};
}

STABLE_TORCH_LIBRARY_IMPL(efft, CPU, library) {
  library.impl("tt_contract_fwd.cpu", TORCH_BOX(&tt_contract_fwd));
  library.impl("tt_contract_bwd.cpu", TORCH_BOX(&tt_contract_bwd));
}

}  // namespace

}  // namespace efft
