"""The weighted sum of low-rank experts as three Triton kernels; ``kernel_sum.py`` calls them, and imports this file last.

Formulas and names are those of ``expert_sum.py``. What is different is what travels: a dense SwiGLU reads gate and up and
writes their product, and so does the forward kernel, whatever the number of experts; each expert's own gate, up and h live
in registers only, in fp32, and the backward kernels make them again.

A token's k chosen experts are k *slots*. In a slot the z of all experts but the token's own is taken for 0, so that one
product with [B_1 .. B_E] serves tokens of different experts side by side. Sums over f (s, dz, dw) and over tokens (dB, dA)
are split over programs, each of which writes its own part; adding the parts up is left to torch, in a fixed order: no
atomics, hence the same bits in every run.

``TRITON_INTERPRET=1``, set before the first import of triton, runs all of it on a CPU.

Shapes: N tokens, k slots, E experts, f intermediate size; R numbers a token has for gate and for up in an expert, Q for
down; ER = E R, EQ = E Q; names that end in P are padded to a power of two, at least 16. BM x BF is the tile of a program.
"""

import triton
import triton.language as tl


@triton.jit
def _activation(x, ACT: tl.constexpr):
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh t) = sigmoid(2 t)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def _slope(x, ACT: tl.constexpr):
    """The activation's derivative."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        y = tl.where(x > 0.0, 1.0, 0.0)
    return y


@triton.jit
def _tile(pointer, rows, stride, row_mask, cols, col_mask):
    """pointer[rows, cols]; 0 outside."""
    return tl.load(pointer + rows[:, None] * stride + cols[None, :], mask=row_mask[:, None] & col_mask[None, :], other=0.0)


@triton.jit
def _dot(x, y, WIDE: tl.constexpr):
    # Triton's interpreter multiplies bfloat16 numbers as the integers that their bits are
    if WIDE:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _dot_added(x, y, total, WIDE: tl.constexpr):
    if WIDE:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def _expanded(base, z, stride_z, b, rows, row_mask, cols, col_mask, expert, f, R: tl.constexpr, ER: tl.constexpr,
              KC: tl.constexpr, WIDE: tl.constexpr):
    """base + B_e z_e, (BM, BF) fp32, each row with its own expert; z from the rows' first number on, b (ER, f)."""
    for start in range(0, ER, KC):
        c = start + tl.arange(0, KC)
        own = (c[None, :] // R == expert[:, None]) & (c < ER)[None, :] & row_mask[:, None]
        z_tile = tl.load(z + rows[:, None] * stride_z + c[None, :], mask=own, other=0.0)
        b_tile = _tile(b, c, f, c < ER, cols, col_mask)
        base = _dot_added(z_tile, b_tile, base, WIDE)
    return base


@triton.jit
def _slot(weights, chosen, rows, row_mask, slot, SLOTS: tl.constexpr):
    """The expert of each row in a slot, -1 outside, and its weight."""
    expert = tl.load(chosen + rows * SLOTS + slot, mask=row_mask, other=-1)
    return expert, tl.load(weights + rows * SLOTS + slot, mask=row_mask, other=0.0)


@triton.jit
def _d_weighted(d_mixed, d_small, a_tile, keep, rows, row_mask, cq, expert, DROPPED: tl.constexpr, Q: tl.constexpr,
                EQ: tl.constexpr, HAS_MASK: tl.constexpr, WIDE: tl.constexpr):
    """d(w_e h_e) = d mixed + A_e^T d shrunk_e, (BM, BF) fp32; the dropout mask is on the rows of A from DROPPED on."""
    own = (cq[None, :] // Q == expert[:, None]) & (cq < EQ)[None, :] & row_mask[:, None]
    if HAS_MASK:
        late = (cq % Q >= DROPPED)[None, :]
        early = tl.load(d_small + rows[:, None] * EQ + cq[None, :], mask=own & (cq % Q < DROPPED)[None, :], other=0.0)
        ds = tl.load(d_small + rows[:, None] * EQ + cq[None, :], mask=own & late, other=0.0)
        found = _dot_added(early, a_tile, d_mixed, WIDE)
        found += _dot(ds, a_tile, WIDE) * keep
    else:
        ds = tl.load(d_small + rows[:, None] * EQ + cq[None, :], mask=own, other=0.0)
        found = _dot_added(ds, a_tile, d_mixed, WIDE)
    return found


@triton.jit
def forward(gate, up, stride_gate, stride_up, z, stride_z, weights, chosen, b_gate, b_up, a, mask, mixed, stride_mixed,
            parts, tokens, f, tiles, SLOTS: tl.constexpr, R: tl.constexpr, ER: tl.constexpr, Q: tl.constexpr,
            EQ: tl.constexpr, EQP: tl.constexpr, DROPPED: tl.constexpr, ACT: tl.constexpr, HAS_MASK: tl.constexpr,
            BM: tl.constexpr, BF: tl.constexpr, KC: tl.constexpr, WIDE: tl.constexpr):
    """mixed (N, f), and parts (splits, N, EQ) of s; a program has BM tokens and ``tiles`` tiles of f."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    split = tl.program_id(1)
    row_mask = rows < tokens
    cq = tl.arange(0, EQP)
    small = tl.zeros((BM, EQP), tl.float32)
    for tile in range(tiles):
        cols = (split * tiles + tile) * BF + tl.arange(0, BF)
        col_mask = cols < f
        base_gate = _tile(gate, rows, stride_gate, row_mask, cols, col_mask).to(tl.float32)
        base_up = _tile(up, rows, stride_up, row_mask, cols, col_mask).to(tl.float32)
        a_tile = tl.trans(_tile(a, cq, f, cq < EQ, cols, col_mask))  # (BF, EQP)
        total = tl.zeros((BM, BF), tl.float32)
        for slot in tl.static_range(SLOTS):
            expert, weight = _slot(weights, chosen, rows, row_mask, slot, SLOTS)
            own_gate = _expanded(base_gate, z, stride_z, b_gate, rows, row_mask, cols, col_mask, expert, f, R, ER, KC,
                                 WIDE)
            own_up = _expanded(base_up, z + ER, stride_z, b_up, rows, row_mask, cols, col_mask, expert, f, R, ER, KC,
                                 WIDE)
            hidden = _activation(own_gate, ACT) * own_up * weight[:, None]
            total += hidden
            found = _dot(hidden.to(a_tile.dtype), a_tile, WIDE)
            if HAS_MASK:
                keep = _tile(mask, rows, f, row_mask, cols, col_mask).to(tl.float32)
                dropped = _dot((hidden * keep).to(a_tile.dtype), a_tile, WIDE)
                found = tl.where((cq % Q >= DROPPED)[None, :], dropped, found)
            small += tl.where(cq[None, :] // Q == expert[:, None], found, 0.0)
        tl.store(mixed + rows[:, None] * stride_mixed + cols[None, :], total.to(mixed.dtype.element_ty),
                 mask=row_mask[:, None] & col_mask[None, :])
    tl.store(parts + (split * tokens + rows)[:, None] * EQ + cq[None, :], small,
             mask=row_mask[:, None] & (cq < EQ)[None, :])


@triton.jit
def backward_tokens(gate, up, stride_gate, stride_up, z, stride_z, weights, chosen, b_gate, b_up, a, mask, d_mixed, d_small,
                    d_gate, d_up, parts_z, parts_w, tokens, f, tiles, SLOTS: tl.constexpr, SLOTSP: tl.constexpr,
                    R: tl.constexpr, ER: tl.constexpr, ERP: tl.constexpr, Q: tl.constexpr, EQ: tl.constexpr,
                    EQP: tl.constexpr, DROPPED: tl.constexpr, ACT: tl.constexpr, HAS_MASK: tl.constexpr, BM: tl.constexpr,
                    BF: tl.constexpr, KC: tl.constexpr, WIDE: tl.constexpr):
    """d gate and d up (N, f); parts of dz (splits, N, 2, ER) and of dw (splits, N, k): what is summed over f."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    split = tl.program_id(1)
    row_mask = rows < tokens
    cq, cr, cs = tl.arange(0, EQP), tl.arange(0, ERP), tl.arange(0, SLOTSP)
    dz_gate = tl.zeros((BM, ERP), tl.float32)
    dz_up = tl.zeros((BM, ERP), tl.float32)
    dw = tl.zeros((BM, SLOTSP), tl.float32)
    for tile in range(tiles):
        cols = (split * tiles + tile) * BF + tl.arange(0, BF)
        col_mask = cols < f
        both = row_mask[:, None] & col_mask[None, :]
        base_gate = _tile(gate, rows, stride_gate, row_mask, cols, col_mask).to(tl.float32)
        base_up = _tile(up, rows, stride_up, row_mask, cols, col_mask).to(tl.float32)
        dm = _tile(d_mixed, rows, f, row_mask, cols, col_mask).to(tl.float32)
        keep = dm
        if HAS_MASK:
            keep = _tile(mask, rows, f, row_mask, cols, col_mask).to(tl.float32)
        a_tile = _tile(a, cq, f, cq < EQ, cols, col_mask)  # (EQP, BF)
        sum_gate = tl.zeros((BM, BF), tl.float32)
        sum_up = tl.zeros((BM, BF), tl.float32)
        for slot in tl.static_range(SLOTS):
            expert, weight = _slot(weights, chosen, rows, row_mask, slot, SLOTS)
            own_gate = _expanded(base_gate, z, stride_z, b_gate, rows, row_mask, cols, col_mask, expert, f, R, ER, KC,
                                 WIDE)
            own_up = _expanded(base_up, z + ER, stride_z, b_up, rows, row_mask, cols, col_mask, expert, f, R, ER, KC,
                                 WIDE)
            active = _activation(own_gate, ACT)
            d_weighted = _d_weighted(dm, d_small, a_tile, keep, rows, row_mask, cq, expert, DROPPED, Q, EQ,
                                      HAS_MASK, WIDE)
            dw += tl.where(cs[None, :] == slot, tl.sum(d_weighted * active * own_up, 1)[:, None], 0.0)
            d_hidden = d_weighted * weight[:, None]
            d_own_up = d_hidden * active
            d_own_gate = d_hidden * own_up * _slope(own_gate, ACT)
            sum_gate += d_own_gate
            sum_up += d_own_up
            own = cr[None, :] // R == expert[:, None]
            b_tile = tl.trans(_tile(b_gate, cr, f, cr < ER, cols, col_mask))  # (BF, ERP)
            dz_gate += tl.where(own, _dot(d_own_gate.to(b_tile.dtype), b_tile, WIDE), 0.0)
            b_tile = tl.trans(_tile(b_up, cr, f, cr < ER, cols, col_mask))
            dz_up += tl.where(own, _dot(d_own_up.to(b_tile.dtype), b_tile, WIDE), 0.0)
        tl.store(d_gate + rows[:, None] * f + cols[None, :], sum_gate.to(d_gate.dtype.element_ty), mask=both)
        tl.store(d_up + rows[:, None] * f + cols[None, :], sum_up.to(d_up.dtype.element_ty), mask=both)
    line = split * tokens + rows
    inside = row_mask[:, None] & (cr < ER)[None, :]
    tl.store(parts_z + line[:, None] * (2 * ER) + cr[None, :], dz_gate, mask=inside)
    tl.store(parts_z + line[:, None] * (2 * ER) + ER + cr[None, :], dz_up, mask=inside)
    tl.store(parts_w + line[:, None] * SLOTS + cs[None, :], dw, mask=row_mask[:, None] & (cs < SLOTS)[None, :])


@triton.jit
def backward_factors(gate, up, stride_gate, stride_up, z, stride_z, weights, chosen, b_gate, b_up, a, mask, d_mixed, d_small,
                     parts_gate, parts_up, parts_a, tokens, f, blocks, SLOTS: tl.constexpr, R: tl.constexpr,
                     ER: tl.constexpr, FROZEN: tl.constexpr, TR: tl.constexpr, TRP: tl.constexpr, Q: tl.constexpr,
                     EQ: tl.constexpr, EQP: tl.constexpr, FROZEN_A: tl.constexpr, TQ: tl.constexpr, TQP: tl.constexpr,
                     DROPPED: tl.constexpr, ACT: tl.constexpr, HAS_MASK: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
                     KC: tl.constexpr, WIDE: tl.constexpr):
    """Parts of dB of gate and up (splits, TR, f) and of dA (splits, TQ, f): what is summed over tokens.

    Of each expert's R (Q) only those from FROZEN (FROZEN_A) on have a gradient: TR (TQ) of all experts together.
    """
    cols = tl.program_id(0) * BF + tl.arange(0, BF)
    split = tl.program_id(1)
    col_mask = cols < f
    cq, tr, tq = tl.arange(0, EQP), tl.arange(0, TRP), tl.arange(0, TQP)
    expert_r, expert_q = tr // (R - FROZEN), tq // (Q - FROZEN_A)
    place_r = expert_r * R + FROZEN + tr % (R - FROZEN)
    place_q = expert_q * Q + FROZEN_A + tq % (Q - FROZEN_A)
    db_gate = tl.zeros((TRP, BF), tl.float32)
    db_up = tl.zeros((TRP, BF), tl.float32)
    da = tl.zeros((TQP, BF), tl.float32)
    a_tile = _tile(a, cq, f, cq < EQ, cols, col_mask)
    for block in range(blocks):
        rows = ((split * blocks + block) * BM + tl.arange(0, BM)).to(tl.int64)
        row_mask = rows < tokens
        base_gate = _tile(gate, rows, stride_gate, row_mask, cols, col_mask).to(tl.float32)
        base_up = _tile(up, rows, stride_up, row_mask, cols, col_mask).to(tl.float32)
        dm = _tile(d_mixed, rows, f, row_mask, cols, col_mask).to(tl.float32)
        keep = dm
        if HAS_MASK:
            keep = _tile(mask, rows, f, row_mask, cols, col_mask).to(tl.float32)
        for slot in tl.static_range(SLOTS):
            expert, weight = _slot(weights, chosen, rows, row_mask, slot, SLOTS)
            own_gate = _expanded(base_gate, z, stride_z, b_gate, rows, row_mask, cols, col_mask, expert, f, R, ER, KC,
                                 WIDE)
            own_up = _expanded(base_up, z + ER, stride_z, b_up, rows, row_mask, cols, col_mask, expert, f, R, ER, KC,
                                 WIDE)
            active = _activation(own_gate, ACT)
            d_hidden = weight[:, None] * _d_weighted(dm, d_small, a_tile, keep, rows, row_mask, cq, expert, DROPPED, Q, EQ,
                                      HAS_MASK, WIDE)
            own = (expert_r[:, None] == expert[None, :]) & (tr < TR)[:, None] & row_mask[None, :]  # (TRP, BM)
            z_tile = tl.load(z + rows[None, :] * stride_z + place_r[:, None], mask=own, other=0.0)
            d_own = (d_hidden * own_up * _slope(own_gate, ACT)).to(z_tile.dtype)
            db_gate = _dot_added(z_tile, d_own, db_gate, WIDE)
            z_tile = tl.load(z + ER + rows[None, :] * stride_z + place_r[:, None], mask=own, other=0.0)
            db_up = _dot_added(z_tile, (d_hidden * active).to(z_tile.dtype), db_up, WIDE)
            own = (expert_q[:, None] == expert[None, :]) & (tq < TQ)[:, None] & row_mask[None, :]
            ds = tl.load(d_small + rows[None, :] * EQ + place_q[:, None], mask=own, other=0.0)
            hidden = active * own_up * weight[:, None]
            if HAS_MASK:
                late = (place_q % Q >= DROPPED)[:, None]
                dropped = (hidden * keep).to(ds.dtype)
                da = _dot_added(tl.where(late, ds, 0.0).to(ds.dtype), dropped, da, WIDE)
                ds = tl.where(late, 0.0, ds).to(ds.dtype)
            da = _dot_added(ds, hidden.to(ds.dtype), da, WIDE)
    inside = (tr < TR)[:, None] & col_mask[None, :]
    tl.store(parts_gate + (split * TR + tr)[:, None] * f + cols[None, :], db_gate, mask=inside)
    tl.store(parts_up + (split * TR + tr)[:, None] * f + cols[None, :], db_up, mask=inside)
    tl.store(parts_a + (split * TQ + tq)[:, None] * f + cols[None, :], da, mask=(tq < TQ)[:, None] & col_mask[None, :])
