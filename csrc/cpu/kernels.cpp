// The table of functions of one instruction set. efft_kernels/build.py compiles this file once per set, with EFFT_ISA
// set to the name of the set and with the flags that it lists for it.
#include "kernels.h"

#include "contract.h"
#include "gather.h"
#include "low_rank.h"

namespace efft::EFFT_ISA {

template <class F>
auto with_type(Type type, F f) {
  return type == Type::float32 ? f(float{}) : f(bf16{});
}

void any_forward(const Forward& op, int64_t begin, int64_t end) {
  with_type(op.x.type,
      [&](auto x) { with_type(op.y.type, [&](auto y) { forward<decltype(x), decltype(y)>(op, begin, end); }); });
}

void any_backward(const Backward& op, int64_t begin, int64_t end, float* dDt, float* dG) {
  with_type(op.x.type, [&](auto x) {
    with_type(op.gy.type, [&](auto gy) { backward<decltype(x), decltype(gy)>(op, begin, end, dDt, dG); });
  });
}

void any_interleave(const float* from, int64_t rows, int64_t columns, void* to, int64_t begin, int64_t end) {
  interleave(Rows<const float>{from + begin * columns, columns}, std::min(end, rows) - begin, columns, columns,
      static_cast<bf16*>(to) + begin * columns);
}

void any_gather(const Gather& op, int64_t begin, int64_t end) {
  with_type(op.from.type, [&](auto from) {
    with_type(op.to.type, [&](auto to) { gather<decltype(from), decltype(to)>(op, begin, end); });
  });
}

void any_contract(const Contraction& op) {
  with_type(op.C.type, [&](auto c) { contract<decltype(c)>(op); });
}

void any_contract_dC(const Contraction& op, Matrix dC) {
  with_type(op.C.type, [&](auto c) { contract_dC<decltype(c)>(op, dC); });
}

void any_contract_dV(const Contraction& op, int64_t begin, int64_t end, float* dV) {
  with_type(op.C.type, [&](auto c) { contract_dV<decltype(c)>(op, begin, end, dV); });
}

void any_merge(
    Matrix W, const float* G, int64_t G_row, Matrix Dt, int64_t d_in, int64_t rank, int64_t begin, int64_t end) {
  with_type(W.type, [&](auto w) { merge<decltype(w)>(W, G, G_row, Dt, d_in, rank, begin, end); });
}

#define EFFT_TEXT_OF(name) #name
#define EFFT_TEXT(name) EFFT_TEXT_OF(name)

extern const Kernels table;
const Kernels table{EFFT_TEXT(EFFT_ISA), PAIRS, any_forward, any_backward, any_interleave, any_gather, any_contract,
    any_contract_dC, any_contract_dV, any_merge};

}  // namespace efft::EFFT_ISA
