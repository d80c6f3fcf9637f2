"""A Concrete mask's draw, its logits' gradient and their step, as Triton kernels; ``launch.py`` calls them.

Formulas and names are those of ``concrete.py``, ``rescale.py`` and ``optimiser.py``. What is different is what travels:
noise, mask, slope and G D live in registers only, in fp32; each kernel reads what it needs once and draws the noise again,
a function of (seed, index) alone. With a logit per entry a draw is two kernels per tensor (the mask's mean; the weights) and
its gradient two (T = dL/da; the logits'); with one for each ``width`` neighbours of a row the mask of the units is kept from
kernel to kernel, and the gradient is three (the mask; sums over units and T; the logits'). The host waits for no number.

Sums are split over programs, each of which writes its own part; the next kernel adds the parts up, in a fixed order: no
atomics, hence the same bits in every run.

``TRITON_INTERPRET=1``, set before the first import of triton, runs all of it on a CPU.

n entries of a tensor, or units; a program walks ``steps`` blocks of 8 SUB of them, 4 SUB where it rounds. A row of
``columns`` entries has ``across`` units, of which the last may be smaller.
"""

import triton
import triton.language as tl

#: Numbers whose value makes no other kernel: one compilation serves tensors and steps alike. Sizes of rows are none of them:
#: where they are multiples of 16, eight entries are read at once.
_PLAIN = ["seed", "count", "place", "steps", "units", "entries"]


@triton.jit
def _words(seed, counter):
    """Four 32-bit words of each counter, side by side: Philox4x32-10 (Salmon et al. 2011)."""
    a, b, c, d = tl.randint4x(seed, counter)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _bits(seed, first, SUB: tl.constexpr):
    """16 random bits for each of the 8 SUB entries from ``first`` on, which is a multiple of 8, fp32 from 0 to 65535."""
    words = _words(seed, first // 8 + tl.arange(0, SUB))
    return tl.interleave(words & 0xFFFF, (words >> 16) & 0xFFFF).to(tl.int32).to(tl.float32)


@triton.jit
def _soft(logits, seed, first, at, inside, power, MIRRORED: tl.constexpr, TRAINED: tl.constexpr, SQUARE: tl.constexpr,
          SUB: tl.constexpr):
    """m = 1 / (1 + ((1 - u) / (u e^s))^(1 / tau)) of a block, (8 SUB,) fp32; u = (bits + 1/2) / 65536."""
    bits = _bits(seed, first, SUB)
    if MIRRORED:
        bits = 65535.0 - bits
    kept = bits + 0.5
    if TRAINED:
        kept *= tl.exp(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32))
    odds = (65535.5 - bits) / kept
    if SQUARE:
        odds *= odds
    else:
        odds = tl.exp2(tl.log2(odds) * power)
    return 1.0 / (1.0 + odds)


@triton.jit
def _total(parts, count, PARTS: tl.constexpr):
    """The sum of a sum's parts."""
    at = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + at, mask=at < count, other=0.0), 0)


@triton.jit(do_not_specialize=_PLAIN)
def measure(logits, parts, seed, n, steps, power, MIRRORED: tl.constexpr, TRAINED: tl.constexpr, SQUARE: tl.constexpr,
            HARD: tl.constexpr, EXPECTED: tl.constexpr, SUB: tl.constexpr):
    """Parts of the sum of what the mask is divided by: m, or sigmoid(s)."""
    program = tl.program_id(0)
    total = tl.zeros([8 * SUB], tl.float32)
    for step in range(steps):
        first = (program * steps + step) * (8 * SUB)
        at = first + tl.arange(0, 8 * SUB)
        inside = at < n
        if EXPECTED:
            value = tl.sigmoid(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32))
        else:
            value = _soft(logits, seed, first, at, inside, power, MIRRORED, TRAINED, SQUARE, SUB)
            if HARD:
                value = tl.where(value > 0.5, 1.0, 0.0)
        total += tl.where(inside, value, 0.0)
    tl.store(parts + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=_PLAIN)
def write(live, base, delta, logits, parts, count, scales, zeros, place, seed, n, steps, power, MIRRORED: tl.constexpr,
          TRAINED: tl.constexpr, SQUARE: tl.constexpr, HARD: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
          SUB: tl.constexpr):
    """live = base + a m delta with a = n / sum, left in scales[place]; zeros[place] counts sums of nothing."""
    program = tl.program_id(0)
    scale = 1.0
    if SCALED:
        total = _total(parts, count, PARTS)
        scale = tl.where(total > 0, n / tl.where(total > 0, total, 1.0), 1.0)
        if program == 0:
            tl.store(scales + place, scale)
            tl.store(zeros + place, tl.load(zeros + place) + (total <= 0).to(tl.int32))
    for step in range(steps):
        first = (program * steps + step) * (8 * SUB)
        at = first + tl.arange(0, 8 * SUB)
        inside = at < n
        mask = _soft(logits, seed, first, at, inside, power, MIRRORED, TRAINED, SQUARE, SUB)
        if HARD:
            mask = tl.where(mask > 0.5, 1.0, 0.0)
        start = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(live + at, (start + scale * mask * change).to(live.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def scale_gradient(gradient, delta, logits, parts, seed, n, steps, power, MIRRORED: tl.constexpr, SQUARE: tl.constexpr,
                   HARD: tl.constexpr, SUB: tl.constexpr):
    """Parts of T = sum of G delta m."""
    program = tl.program_id(0)
    total = tl.zeros([8 * SUB], tl.float32)
    for step in range(steps):
        first = (program * steps + step) * (8 * SUB)
        at = first + tl.arange(0, 8 * SUB)
        inside = at < n
        mask = _soft(logits, seed, first, at, inside, power, MIRRORED, True, SQUARE, SUB)
        if HARD:
            mask = tl.where(mask > 0.5, 1.0, 0.0)
        slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        total += slope * tl.load(delta + at, mask=inside, other=0.0).to(tl.float32) * mask
    tl.store(parts + program, tl.sum(total, 0))


@triton.jit
def _entries_of(unit, columns, across, width):
    """How many entries each unit has."""
    return tl.minimum(width, columns - (unit % across) * width)


@triton.jit(do_not_specialize=_PLAIN)
def measure_units(logits, mask, parts, seed, n, steps, power, columns, across, width, MIRRORED: tl.constexpr,
                  TRAINED: tl.constexpr, SQUARE: tl.constexpr, HARD: tl.constexpr, EXPECTED: tl.constexpr,
                  SUB: tl.constexpr):
    """The units' mask, and parts of the sum over entries of what it is divided by."""
    program = tl.program_id(0)
    total = tl.zeros([8 * SUB], tl.float32)
    for step in range(steps):
        first = (program * steps + step) * (8 * SUB)
        at = first + tl.arange(0, 8 * SUB)
        inside = at < n
        value = _soft(logits, seed, first, at, inside, power, MIRRORED, TRAINED, SQUARE, SUB)
        if HARD:
            value = tl.where(value > 0.5, 1.0, 0.0)
        tl.store(mask + at, value, mask=inside)
        if EXPECTED:
            value = tl.sigmoid(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32))
        total += tl.where(inside, value * _entries_of(at, columns, across, width), 0.0)
    tl.store(parts + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=_PLAIN)
def write_units(live, base, delta, mask, parts, count, scales, zeros, place, n, steps, columns, across, width,
                SCALED: tl.constexpr, PARTS: tl.constexpr, SUB: tl.constexpr):
    """``write``, with the units' mask."""
    program = tl.program_id(0)
    scale = 1.0
    if SCALED:
        total = _total(parts, count, PARTS)
        scale = tl.where(total > 0, n / tl.where(total > 0, total, 1.0), 1.0)
        if program == 0:
            tl.store(scales + place, scale)
            tl.store(zeros + place, tl.load(zeros + place) + (total <= 0).to(tl.int32))
    for step in range(steps):
        at = (program * steps + step) * (8 * SUB) + tl.arange(0, 8 * SUB)
        inside = at < n
        kept = tl.load(mask + (at // columns) * across + (at % columns) // width, mask=inside, other=0.0)
        start = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(live + at, (start + scale * kept * change).to(live.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def gather_units(gradient, delta, mask, sums, parts, units, steps, columns, across, width, UNITS: tl.constexpr,
                 COLUMNS: tl.constexpr):
    """c_j = the sum of G delta over each unit, and parts of T = sum of c_j m_j."""
    program = tl.program_id(0)
    total = tl.zeros([UNITS], tl.float32)
    for step in range(steps):
        unit = (program * steps + step) * UNITS + tl.arange(0, UNITS)
        there = unit < units
        start = (unit // across) * columns + (unit % across) * width
        size = _entries_of(unit, columns, across, width)
        found = tl.zeros([UNITS, COLUMNS], tl.float32)
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = there[:, None] & (column[None, :] < size[:, None])
            at = start[:, None] + column[None, :]
            slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
            found += slope * tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        c = tl.sum(found, 1)
        tl.store(sums + unit, c, mask=there)
        total += c * tl.load(mask + unit, mask=there, other=0.0)
    tl.store(parts + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=_PLAIN)
def logit_gradient(gradient, delta, logits, out, parts, count, scales, place, weight, entries, seed, n, steps, power,
                   columns, across, width, WIDE: tl.constexpr, MIRRORED: tl.constexpr, SQUARE: tl.constexpr,
                   SCALED: tl.constexpr, MOVING: tl.constexpr, EXPECTED: tl.constexpr, ADD: tl.constexpr,
                   PARTS: tl.constexpr, SUB: tl.constexpr):
    """out (+)= weight dL/ds: a (c - size a T / entries) m', without the mean's part where it stands still, or with its own.

    c is G delta of an entry; of units that are WIDE ``gradient`` is their sums, and ``delta`` is not read.
    """
    program = tl.program_id(0)
    scale = 1.0
    if SCALED:
        scale = tl.load(scales + place)
    share = 0.0
    if MOVING or EXPECTED:
        share = scale * _total(parts, count, PARTS) / entries
    for step in range(steps):
        first = (program * steps + step) * (8 * SUB)
        at = first + tl.arange(0, 8 * SUB)
        inside = at < n
        # of a hard draw too: its slope is that of the soft one, straight through
        mask = _soft(logits, seed, first, at, inside, power, MIRRORED, True, SQUARE, SUB)
        value = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        if WIDE:
            size = _entries_of(at, columns, across, width)
        else:
            size = 1.0
            value *= tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        if MOVING:
            value -= share * size
        value *= scale * power * (mask - mask * mask)
        if EXPECTED:
            keep = tl.sigmoid(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32))
            value -= scale * share * size * (keep - keep * keep)
        value *= weight
        if ADD:
            value += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(values, bits):
    """fp32 -> bfloat16 at random, right in the mean: the 16 bits that it lacks carry with a probability of their size."""
    pattern = values.to(tl.int32, bitcast=True)
    # inf and NaN stay what they are
    carried = tl.where((pattern & 0x7F800000) == 0x7F800000, pattern, (pattern + bits) & -65536)
    return carried.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=_PLAIN)
def adam(values, gradient, mean, square, seed, n, steps, beta1, rest1, beta2, rest2, eps, decay, rate, correction,
         SUB: tl.constexpr):
    """AdamW's step in place, bfloat16: rate = lr / (1 - beta1^t), correction = 1 / sqrt(1 - beta2^t), decay = 1 - lr wd."""
    program = tl.program_id(0)
    for step in range(steps):
        first = (program * steps + step) * (4 * SUB)
        at = first + tl.arange(0, 4 * SUB)
        inside = at < n
        words = _words(seed, first // 4 + tl.arange(0, SUB))
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        m = beta1 * tl.load(mean + at, mask=inside, other=0.0).to(tl.float32) + rest1 * g
        v = beta2 * tl.load(square + at, mask=inside, other=0.0).to(tl.float32) + rest2 * g * g
        s = decay * tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        s -= rate * m / (tl.sqrt(v) * correction + eps)
        low, high = (words & 0xFFFF).to(tl.int32), ((words >> 16) & 0xFFFF).to(tl.int32)
        tl.store(values + at, _rounded(s, high), mask=inside)
        tl.store(mean + at, _rounded(m, low), mask=inside)
        tl.store(square + at, _rounded(v, low), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def noise(out, seed, n, steps, SUB: tl.constexpr):
    """The bits that a draw sees, int16 as ``random_bits`` gives them: for those who compare."""
    program = tl.program_id(0)
    for step in range(steps):
        first = (program * steps + step) * (8 * SUB)
        at = first + tl.arange(0, 8 * SUB)
        tl.store(out + at, (_bits(seed, first, SUB).to(tl.int32) - 32768).to(tl.int16), mask=at < n)
