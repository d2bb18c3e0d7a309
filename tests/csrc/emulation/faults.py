"""List faults to plant in csrc/cuda.

tests/csrc/test_emulated.py builds the kernels with one fault at a time and expects the emulator to report it. Each
entry replaces a text in one file. An entry also contains a regular expression for the message that must be reported,
and in most of the dictionaries the family of cases in ragged.py that must fail. "WRONG" is the message for a wrong
result. The faults for the third generation of kernels are in pingpong_faults.py.
"""

from __future__ import annotations

#: Faults in the kernels for compute capability 8.0: (file, text, text with the fault, family of cases, message).
FAULTS = {
    "no barrier before a buffer is filled again": (
        "lowrank_gemm.cu",
        "    __syncthreads();  // the copies of all threads",
        "    // the copies of all threads",
        "linear",
        "WRONG",
    ),
    "too few copies waited for": (
        "project.cu",
        "wait_copies<STAGES - 2>();",
        "wait_copies<STAGES - 1>();",
        "linear",
        "WRONG|copies under way",
    ),
    "no barrier between steps of a small product": (
        "small_product.cuh",
        "      __syncthreads();  // no thread reads the previous chunk any more\n",
        "",
        "contract",
        "WRONG",
    ),
    "a barrier for some": (
        "small_product.cuh",
        "      __syncthreads();  // no thread reads",
        "      if (thread < 64) __syncthreads();  // no thread reads",
        "contract",
        "divergent barrier",
    ),
    "left matrices in the wrong order": (
        "accumulator.cuh",
        "a.chunk(m + matrix % 2 * 8 + row, k / 8 + matrix / 2)",
        "a.chunk(m + matrix / 2 * 8 + row, k / 8 + matrix % 2)",
        "linear",
        "WRONG .*bfloat16",
    ),
    "right matrices in the wrong order": (
        "accumulator.cuh",
        "b.chunk(k + matrix % 2 * 8 + row, n / 8 + matrix / 2)",
        "b.chunk(k + matrix / 2 * 8 + row, n / 8 + matrix % 2)",
        "linear",
        "WRONG .*bfloat16",
    ),
    "sums written in the wrong place": (
        "accumulator.cuh",
        "first_column() + 8 * j + lane() % 4 * 2",
        "first_column() + 8 * j + lane() % 8 * 2",
        "linear",
        "WRONG .*bfloat16|AddressSanitizer",
    ),
    "a row too many": (
        "tiles.cuh",
        "row + r < from.rows && left > 0",
        "row + r <= from.rows && left > 0",
        "linear",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "columns beyond the end": (
        "tiles.cuh",
        "(left < PER_CHUNK ? static_cast<int>(left) : PER_CHUNK)",
        "PER_CHUNK",
        "linear",
        "WRONG|AddressSanitizer",
    ),
    "an output row too many": (
        "lowrank_gemm.cu",
        "if (row >= op.M || column >= op.N) return;",
        "if (row > op.M || column >= op.N) return;",
        "linear",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "less shared memory than is used": (
        "project.cu",
        "static constexpr int BYTES = STAGES * STAGE",
        "static constexpr int BYTES = (STAGES - 1) * STAGE",
        "linear",
        "past the shared memory|AddressSanitizer",
    ),
    "the tail left out": (
        "lowrank_gemm.cu",
        "steps = main_steps + (op.R + K - 1) / K",
        "steps = main_steps + op.R / K",
        "update",
        "WRONG update",
    ),
    "the last range of tokens forgotten": (
        "reduce_tokens.cu",
        "split < op.splits; ++split)",
        "split < op.splits - (op.splits > 1); ++split)",
        "linear",
        "WRONG .* dG",
    ),
    "the slope of the other GELU": (
        "gelu.cuh",
        "return which == Producer::gelu_tanh ?",
        "return which != Producer::gelu_tanh ?",
        "gelu",
        "WRONG .* dx",
    ),
    "a mask of the wrong layer": (
        "contract.cu",
        "keep_V[(layer * r2 + j) * d_out + n]",
        "keep_V[j * d_out + n]",
        "contract",
        "WRONG .* dV",
    ),
}

KERNEL, PIPELINE = "lowrank_gemm_sm90.cu", "pipeline_sm90.cuh"
#: Code in which a thread writes an element of a buffer that a product reads, without a change of its value.
WRITE = (
    "{ volatile auto& one = reinterpret_cast<volatile uint16_t&>(shared.a[place.stage * P::BYTES_A / 2]); "
    "if (thread == 0) one = one; }\n"
)
#: Faults in the kernel for compute capability 9.0: (file, text, text with the fault, message). The family of cases is
#: "tiles bfloat16".
HOPPER_FAULTS = {
    "a buffer released before its products are done": (
        KERNEL,
        "warpgroup_wait<1>();",
        "warpgroup_wait<2>();",
        "overwrites what a product under way still reads",
    ),
    "the wrong phase of full buffers": (
        KERNEL,
        "shared.full[place.stage].wait(place.round);",
        "shared.full[place.stage].wait(place.round ^ 1);",
        "what a copy has not brought yet|deadlock|barrier",
    ),
    "the wrong phase of empty buffers": (
        PIPELINE,
        "shared.empty[stage].wait(place.round ^ 1);",
        "shared.empty[stage].wait(place.round);",
        "deadlock",
    ),
    "phases that never change": (
        PIPELINE,
        "      round ^= 1;\n",
        "",
        "deadlock|overwrites|not brought|two copies|more arrivals",
    ),
    "one block of the pair not waited for": (
        KERNEL,
        "shared.empty[stage].init(PAIR * P::GROUPS);",
        "shared.empty[stage].init(P::GROUPS);",
        "overwrites|more arrivals|not brought|two copies",
    ),
    "too few bytes expected": (
        PIPELINE,
        "P::BYTES_A + P::BYTES_B + P::BYTES_P",
        "P::BYTES_A + P::BYTES_B",
        "not brought|deadlock",
    ),
    "a product in another swizzle than the copy": (
        KERNEL,
        "typename P::LayoutP{});\n  typename P::Mma mma;",
        "tile_to_shape(GMMA::Layout_K_SW64_Atom<typename P::T>{}, "
        "Shape<typename P::R, typename P::K, Int<STAGES>>{}));\n  typename P::Mma mma;",
        "WRONG",
    ),
    "lanes ahead of the one that copies": (
        KERNEL,
        "    __syncwarp();  // waits for lane 0",
        "    // waits for lane 0",
        "converged",
    ),
    "rows read before all lanes have written them": (
        KERNEL,
        "    __syncwarp();\n#pragma unroll\n    for (int half",
        "#pragma unroll\n    for (int half",
        "WRONG",
    ),
    "rows written before all lanes have read them": (
        KERNEL,
        "    __syncwarp();\n#pragma unroll\n    for (int j",
        "#pragma unroll\n    for (int j",
        "WRONG",
    ),
    "the last tile left out": (
        PIPELINE,
        "return rows * columns;",
        "return rows * columns - (rows * columns > 1);",
        "WRONG",
    ),
    "a tile of the next column": (PIPELINE, "n = within / height;", "n = (within + 1) / height;", "WRONG"),
    "columns of H beyond the rank kept": (KERNEL, "< op.R ? h(i) : 0.0f", "< P::RANKS ? h(i) : 0.0f", "WRONG infinite"),
    "the tail left out": (
        PIPELINE,
        "main_steps + blocks(op.R, typename P::K{})",
        "main_steps + op.R / 64",
        "WRONG|deadlock",
    ),
    "an output row too many": (
        KERNEL,
        "if (m < op.M && n < op.N)",
        "if (m <= op.M && n < op.N)",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "sums read before the products are done": (
        KERNEL,
        "      warpgroup_commit_batch();\n      warpgroup_wait<0>();\n",
        "      warpgroup_commit_batch();\n",
        "WRONG|under way",
    ),
    "registers not fenced before a product": (KERNEL, "      warpgroup_arrive();\n", "", "without a fence"),
    "barriers not fenced": (KERNEL, "    cutlass::arch::fence_barrier_init();\n", "", "before a fence"),
    "a block that starts before the other's barriers are there": (
        KERNEL,
        "  cluster_arrive_relaxed();\n  cluster_wait();  // the barriers",
        "  // the barriers",
        "no barrier|before a fence",
    ),
    "a block that ends before the other": (
        KERNEL,
        "  cluster_arrive();\n  cluster_wait();\n}",
        "}",
        "that has ended",
    ),
    "a write that products may not see": (
        KERNEL,
        "      warpgroup_arrive();\n",
        f"      {WRITE}      warpgroup_arrive();\n",
        "without a proxy fence",
    ),
    "a write to an operand of a product under way": (
        KERNEL,
        "      warpgroup_commit_batch();\n",
        f"      warpgroup_commit_batch();\n      {WRITE}",
        "a thread overwrites what a product under way still reads",
    ),
}

SUMS, MLP = "reduce_tokens_sm90.cu", "mlp tiles bfloat16"
WAIT = "wait_for_kernel_in_front();"
#: Faults in the second generation of kernels, which EFFT_SM90_GENERATION=2 selects on compute capability 9.0: (file,
#: text, text with the fault, family of cases, message).
SECOND_FAULTS = {
    "a step of the tail too few": (
        PIPELINE,
        "(blocks(op.R, 16) - 1) % 4 + 1",
        "std::max((blocks(op.R, 16) - 1) % 4, 1)",
        "tiles bfloat16",
        "WRONG",
    ),
    "neighbours stored in the wrong order": (
        KERNEL,
        "{narrow<Out>(first), narrow<Out>(second)}",
        "{narrow<Out>(second), narrow<Out>(first)}",
        "tiles bfloat16",
        "WRONG",
    ),
    "a product that does not wait": (KERNEL, WAIT, "", "tiles bfloat16", "before the kernel in front has ended"),
    "a projection that does not wait": ("project.cu", WAIT, "", "linear", "before the kernel in front has ended"),
    "a copy that does not wait": ("pack.cu", WAIT, "", "linear", "before the kernel in front has ended"),
    "sums that do not wait": (SUMS, WAIT, "", "sums", "before the kernel in front has ended"),
    "sums read before they are there": (
        SUMS,
        "synchronize_cluster();  // the sums of all blocks are complete",
        "__syncthreads();",
        "sums",
        "WRONG",
    ),
    "a block that ends before its sums are read": (
        SUMS,
        "  synchronize_cluster();  // no block reads the sums of this block any more\n",
        "",
        "sums",
        "that has ended",
    ),
    "the last block forgotten": (
        SUMS,
        "block < range.splits; ++block",
        "block < range.splits - (range.splits > 1); ++block",
        "sums",
        "WRONG",
    ),
    "elements that no block adds": (
        SUMS,
        "i += static_cast<int>(range.splits) * THREADS",
        "i += static_cast<int>(range.splits + 1) * THREADS",
        "sums",
        "WRONG",
    ),
    "sums written over tiles that others still read": (
        SUMS,
        "  __syncthreads();  // no thread reads the last tiles any more\n",
        "",
        "sums",
        "WRONG",
    ),
    "parts added before all threads have brought theirs": (
        SUMS,
        "  __syncthreads();\n  add_parts<T>(sums + RANKS * ROW, parts);",
        "  add_parts<T>(sums + RANKS * ROW, parts);",
        "sums",
        "WRONG .* db",
    ),
    "a column too many": (
        SUMS,
        "if (column >= op.d_out) return;",
        "if (column > op.d_out) return;",
        "sums",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "tokens of the next range": (
        SUMS,
        "range.begin + tokens < op.tokens ? range.begin + tokens : op.tokens",
        "range.begin + tokens + 1 < op.tokens ? range.begin + tokens + 1 : op.tokens",
        "sums",
        "WRONG",
    ),
    "the norm's mean left out": (SUMS, "((at[i] - mean) * rstd)", "(at[i] * rstd)", "sums", "WRONG .* dgamma"),
    "columns of another layer": (
        SUMS,
        "    group -= Groups(all.of[layer]).count();\n",
        "    ;\n",
        MLP,
        "WRONG",
    ),
    "the second layer left out": (
        SUMS,
        "return count;\n}\n\n// Returns the largest",
        "return all.count > 1 ? Groups(all.of[0]).count() : count;\n}\n\n// Returns the largest",
        MLP,
        "WRONG",
    ),
    "the rank of the second layer left out": (
        SUMS,
        "rank = std::max(rank, all.of[i].rank)",
        "rank = all.of[0].rank",
        MLP,
        "WRONG .* d[DG]1",
    ),
    "copies that nothing launches before the sums": (
        "tt_linear.cpp",
        "    launches.stream();  // launches the copies of operands, which a later launch will read\n",
        "",
        MLP,
        "WRONG .* dG2",
    ),
    "operands that are freed before the sums are launched": (
        "tt_linear.cpp",
        "    later->operands.insert(later->operands.end(), {gy, x, a, da, h, dh});\n",
        "",
        MLP,
        "AddressSanitizer: heap-use-after-free",
    ),
    "the half of H not waited for": (
        KERNEL,
        "        shared.has_half[warp].wait(half_round);\n",
        "",
        "tiles bfloat16",
        "not brought|WRONG",
    ),
    "phases of the halves that never change": (
        KERNEL,
        "        half_round ^= 1;\n",
        "",
        "tiles bfloat16",
        "not brought|WRONG|two copies|deadlock",
    ),
    "the half sent to the block that made it": (
        KERNEL,
        "send_async(1 - rank, mine",
        "send_async(rank, mine",
        "tiles bfloat16",
        "WRONG",
    ),
    "halves in the wrong order": (
        KERNEL,
        "pairs(i) = rank == 0 ? mine[i] : other;",
        "pairs(i) = rank == 0 ? other : mine[i];",
        "tiles bfloat16",
        "WRONG",
    ),
    "too few bytes of a half expected": (
        KERNEL,
        "arrive_and_expect_tx(32 * sizeof(mine))",
        "arrive_and_expect_tx(31 * sizeof(mine))",
        "tiles bfloat16",
        "not brought|deadlock",
    ),
    "rows of A for one block only": (
        PIPELINE,
        "copy(from.A.with(barrier, both), from_a",
        "copy(from.A.with(barrier, uint16_t(1 << rank)), from_a",
        "tiles bfloat16",
        "deadlock",
    ),
}
