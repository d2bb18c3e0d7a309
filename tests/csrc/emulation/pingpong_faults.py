"""List faults to plant in the product of the third generation of kernels for compute capability 9.0.

The entries have the same form as those in faults.py.
"""

from __future__ import annotations

from tests.csrc.emulation.faults import MLP, WAIT

PINGPONG = "lowrank_gemm_pingpong_sm90.cu"
TILES = "tiles bfloat16"
READ = "    wait_for_threads(STAGED + me.group, GROUP_THREADS);\n    if (me.warp != 0) return;\n"
FENCE = "  cutlass::arch::fence_view_async_shared();  // makes what this thread wrote visible to the bulk copy\n"
STAGED = "  wait_for_threads(STAGED + me.group, GROUP_THREADS);\n"
NEXT_TURN = "      arrive_for_threads(TURN + Consumer::me().other(),"
NOT_LAST = "    if (!turns.recomputed().is_last(tile))\n"
#: Faults in the third generation: (file, text, text with the fault, family of cases, message).
THIRD_FAULTS = {
    "a store that may not see the tile": (PINGPONG, FENCE, "", TILES, "wrote without a proxy fence"),
    "a fence after the barrier": (PINGPONG, FENCE + STAGED, STAGED + FENCE, TILES, "wrote without a proxy fence"),
    "a tile stored before all warps have written it": (
        PINGPONG,
        FENCE + STAGED,
        FENCE,
        TILES,
        "WRONG|has not read yet|without a proxy fence",
    ),
    "a tile written before the last one has been read": (
        PINGPONG,
        "  if (me.lane == 0) wait_until_stores_have_read<0>();\n",
        "",
        TILES,
        "has not read",
    ),
    "a tile written out of turn": (
        PINGPONG,
        "  if (!Turns::is_first(tile)) wait_for_threads(FREE + me.group, GROUP_THREADS + WARP_THREADS);\n",
        "",
        TILES,
        "has not read|WRONG|arrives again|incomplete barrier",
    ),
    "a store that nothing commits": (PINGPONG, "  commit_stores();\n", "", TILES, "not committed|has not read"),
    "lanes ahead of the one that stores": (
        PINGPONG,
        "  __syncwarp();  // waits for lane 0, because complete warps must arrive at barriers\n",
        "",
        TILES,
        "not converged",
    ),
    "a wait for the other group's turn": (
        PINGPONG,
        "wait_for_threads(TURN + Consumer::me().group,",
        "wait_for_threads(TURN + Consumer::me().other(),",
        TILES,
        "deadlock|arrives again|incomplete barrier",
    ),
    "a turn that a group gives itself": (
        PINGPONG,
        NEXT_TURN,
        NEXT_TURN.replace("other()", "group"),
        TILES,
        "deadlock|arrives again|incomplete barrier",
    ),
    "a turn after the last tile": (
        PINGPONG,
        NOT_LAST + NEXT_TURN,
        NEXT_TURN,
        TILES,
        "incomplete barrier",
    ),
    "a wait before the first tile": (
        PINGPONG,
        "if (!Turns::is_first(tile)) wait_for_threads(TURN",
        "wait_for_threads(TURN",
        TILES,
        "deadlock",
    ),
    "another number of threads": (
        PINGPONG,
        "arrive_for_threads(FREE + me.other(), GROUP_THREADS + WARP_THREADS)",
        "arrive_for_threads(FREE + me.other(), GROUP_THREADS)",
        TILES,
        "different numbers of threads|deadlock",
    ),
    "a tile written before all threads have read it": (
        PINGPONG,
        READ,
        READ.partition("\n")[2],
        MLP,
        "WRONG",
    ),
    "a GELU of a tile that not all warps have written": (
        PINGPONG,
        FENCE + STAGED,
        FENCE + STAGED.replace("  wait", "  if (op.gelu.which == Producer::none) wait"),
        MLP,
        "WRONG|has not read yet|without a proxy fence",
    ),
    "a store of z that may not see the tile": (PINGPONG, FENCE, "", MLP, "wrote without a proxy fence"),
    "a tile written before z has been read": (
        PINGPONG,
        "  if (me.lane == 0) wait_until_stores_have_read<0>();\n",
        "",
        MLP,
        "has not read",
    ),
    "a GELU of a tile in another swizzle": (PINGPONG, "(chunk ^ first_row % 8) * 16", "chunk * 16", MLP, "WRONG"),
    "a GELU of the next tile": (
        PINGPONG,
        "apply_gelu<P, Out>(op, m, n, shared);\n    __syncwarp",
        "apply_gelu<P, Out>(op, m + 1, n, shared);\n    __syncwarp",
        MLP,
        "WRONG",
    ),
    "z of the chunks before": (PINGPONG, "    from_z.skip(step, AHEAD);\n", "", MLP, "WRONG .* d"),
    "z read too late": (
        PINGPONG,
        "for (int i = 0; i < AHEAD; ++i) z[i] = next[i];\n"
        "      if (step + AHEAD < Places::STEPS) read_z(step + AHEAD);",
        "for (int i = 0; i < AHEAD; ++i) z[i] = next[i];",
        MLP,
        "WRONG .* d",
    ),
    "rows of a GELU beyond the last one": (
        PINGPONG,
        "min(op.M - row, int64_t",
        "min(op.M + 1 - row, int64_t",
        MLP,
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "columns of a GELU beyond the last one": (
        PINGPONG,
        "min(op.N - column, int64_t",
        "min(op.N + 8 - column, int64_t",
        MLP,
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "boxes of a GELU in the wrong order": (
        PINGPONG,
        "at += P::BOX_COLUMNS / 8 - STEPS_OF_BOX * down",
        "at += P::BOX_COLUMNS / 8 * (at == nullptr) - STEPS_OF_BOX * down",
        MLP,
        "WRONG",
    ),
    "the other GELU": (PINGPONG, "by_tanh = op.gelu.which ==", "by_tanh = op.gelu.which !=", MLP, "WRONG"),
    "the slope instead of the value": (
        PINGPONG,
        "round_pair<Out>(one.value, other.value)",
        "round_pair<Out>(one.slope, other.slope)",
        MLP,
        "WRONG",
    ),
    "the slope of the neighbor": (
        PINGPONG,
        "next_gradient * other.slope",
        "next_gradient * one.slope",
        MLP,
        "WRONG .* d",
    ),
    "the gradient before the GELU stored as well": (
        PINGPONG,
        "me.lane == 0 && !op.gelu.z.data) store_tile",
        "me.lane == 0) store_tile",
        MLP,
        "WRONG .* d",
    ),
    "z not stored": (
        PINGPONG,
        "me.lane == 0 && !op.gelu.z.data) store_tile",
        "me.lane == 0 && !has_gelu) store_tile",
        MLP,
        "WRONG",
    ),
    "another swizzle of the staging tile": (
        PINGPONG,
        "(chunk ^ row % 8) * 16",
        "(chunk ^ row % 4) * 16",
        TILES,
        "WRONG",
    ),
    "matrices stored in the wrong order": (
        PINGPONG,
        "me.lane % 16, chunk = me.lane / 16",
        "me.lane / 16 * 8 + me.lane % 8, chunk = me.lane / 8 % 2",
        TILES,
        "WRONG",
    ),
    "one part of a tile over the other": (PINGPONG, "part * 64 * P::ROW_BYTES", "0 * part", TILES, "WRONG"),
    "a bias of other columns": (PINGPONG, "first + i / 2 * 8 + i", "first + i / 2 * 4 + i", TILES, "WRONG"),
    "a row of Y too many": (
        PINGPONG,
        "P::copy_y(op.Y, static_cast<int>(op.M),",
        "P::copy_y(op.Y, static_cast<int>(op.M) + 1,",
        TILES,
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a row of H too many": (
        PINGPONG,
        "if (row < op.M && r < op.H.row)",
        "if (row <= op.M && r < op.H.row)",
        TILES,
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a buffer released before its products are done": (
        PINGPONG,
        "warpgroup_wait<1>();",
        "warpgroup_wait<2>();",
        TILES,
        "overwrites what a product under way still reads",
    ),
    "a tail whose operand has not arrived": (
        PINGPONG,
        "    if constexpr (P::RANKS > 0) shared.full[place.stage].wait(place.round);\n",
        "",
        TILES,
        "not brought",
    ),
    "a tail that is not waited for": (
        PINGPONG,
        "        warpgroup_commit_batch();\n        warpgroup_wait<0>();\n",
        "        warpgroup_commit_batch();\n",
        TILES,
        "WRONG|under way",
    ),
    "the buffers of the other group": (
        PINGPONG,
        "  place.skip(Consumer::me().group * tiles.steps);\n",
        "",
        TILES,
        "WRONG|deadlock|overwrites|not brought|two copies|more arrivals|different products",
    ),
    "no buffers left out for the other group": (
        PINGPONG,
        ", place.skip(tiles.steps)) {",
        ") {",
        TILES,
        "WRONG|deadlock|overwrites|not brought|two copies|more arrivals",
    ),
    "a buffer that both groups must release": (
        PINGPONG,
        "shared.empty[stage].init(PAIR);",
        "shared.empty[stage].init(PAIR * P::CONSUMERS);",
        TILES,
        "deadlock",
    ),
    "halves of both groups in one memory": (
        PINGPONG,
        "return group * GROUP_THREADS + thread;",
        "return thread;",
        TILES,
        "WRONG|deadlock|not brought|two copies|more arrivals",
    ),
    "the half of H not waited for": (
        PINGPONG,
        "  has_half.wait(static_cast<uint32_t>(turns.recomputed().number(tile) % 2));\n",
        "",
        TILES,
        "not brought|WRONG",
    ),
    "phases of the halves that never change": (
        PINGPONG,
        "turns.recomputed().number(tile) % 2",
        "0",
        TILES,
        "not brought|WRONG|two copies|deadlock",
    ),
    "halves in the wrong order": (
        PINGPONG,
        "pairs(i) = is_left ? own[i] : received;",
        "pairs(i) = is_left ? received : own[i];",
        TILES,
        "WRONG",
    ),
    "columns of H beyond the rank kept": (
        PINGPONG,
        "r + 1 < op.R ? h(",
        "r + 1 < P::RANKS ? h(",
        TILES,
        "WRONG infinite",
    ),
    "a product that does not wait": (PINGPONG, WAIT, "", TILES, "before the kernel in front has ended"),
    "more registers than the block has": (
        PINGPONG,
        "warpgroup_reg_dealloc<24>",
        "warpgroup_reg_dealloc<32>",
        TILES,
        "more registers than there are",
    ),
}
