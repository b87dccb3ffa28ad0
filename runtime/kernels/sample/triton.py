# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels that choose the next token from logits [V] and hand it to the next step, all on the device.

Nothing is sorted. A filter keeps the tokens whose score is at least some threshold, and how many tokens, or how much
probability, lie above a threshold falls as it rises; so each pass tries many thresholds between two that enclose the
right one and keeps the two neighbours that still do. Four passes of 64 leave a 2^-24th of the first interval. The draw
is the largest of score + Gumbel noise among those kept (the Gumbel-max trick), noise from Philox counters (Salmon et
al. 2011): a function of seed, position and token, whatever the device does.

Each launch leaves its sum over programs to the last to arrive, which adds in the order of the programs: results repeat
to the bit.

Launches are of PROGRAMS × texts: the second number of a program is its text, and every argument has one row a text.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.arrivals import arrived, let_in, take_turn

_LOWEST = tl.constexpr(float("-inf"))
_HIGHEST = tl.constexpr(float("inf"))


@triton.jit
def _take(token, sound, token_ptr, position_ptr, history_ptr, seen_ptr, V, SLOTS, PENALTY: tl.constexpr):
    """Make ``token`` the next step's; one that comes of broken logits is told as −1 and fed as 0.

    A text that nobody reads any more stays at the last of its SLOTS.
    """
    text = tl.program_id(1)
    position = tl.load(position_ptr + text) + 1
    tl.store(position_ptr + text, tl.minimum(position, SLOTS - 1))
    tl.store(token_ptr + text, tl.where(sound, token, 0).to(tl.int64))
    tl.store(history_ptr + text * (SLOTS + 1) + position, tl.where(sound, token, -1).to(tl.int64))
    if PENALTY:
        tl.store(seen_ptr + text * V + tl.where(sound, token, 0), 1)


@triton.jit
def _best(value, index):
    """The largest of ``value`` and the lowest ``index`` that has it."""
    best = tl.max(value)
    return best, tl.min(tl.where(value == best, index, 2147483647))


@triton.jit
def begin(
    logits_ptr,
    scores_ptr,
    seen_ptr,
    settings_ptr,
    value_ptr,
    index_ptr,
    bracket_ptr,
    arrivals_ptr,
    token_ptr,
    position_ptr,
    history_ptr,
    V,
    SLOTS,
    PROGRAMS,
    BLOCK: tl.constexpr,
    PP: tl.constexpr,
    PENALTY: tl.constexpr,
    GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):
    """GREEDY: take the best of logits float32 [V]. Else: logits, the seen ones penalised, into scores float32 [V], and
    their extent into bracket (lowest, above the highest, highest, whether all are finite).

    settings float32: inverse temperature, log of min_p, top_p, penalty. Scratch of value [2, PP] and index [PP]. The
    history has room for SLOTS + 1.
    """
    let_in(PDL, True)
    take_turn(PDL, True)
    program = tl.program_id(0)
    text = tl.program_id(1)
    logits_ptr += text * V
    scores_ptr += text * V
    settings_ptr += text * 4
    value_ptr += text * (2 * PP)
    index_ptr += text * PP
    bracket_ptr += text * 5
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < V
    x = tl.load(logits_ptr + i, mask=inside, other=0.0)
    if PENALTY:
        penalty = tl.load(settings_ptr + 3)
        seen = tl.load(seen_ptr + text * V + i, mask=inside, other=0) != 0
        x = tl.where(seen, tl.where(x < 0.0, x * penalty, x / penalty), x)
    if not GREEDY:
        tl.store(scores_ptr + i, x, mask=inside)
    sound = tl.min(tl.where(x < _HIGHEST, 1, 0)) == 1  # NaN compares false
    x = tl.where(inside & (x < _HIGHEST), x, _LOWEST)
    best, at = _best(x, i)
    tl.store(value_ptr + program, tl.where(sound, best, _HIGHEST))
    tl.store(value_ptr + PP + program, tl.min(tl.where(x == _LOWEST, _HIGHEST, x)))
    tl.store(index_ptr + program, at)
    if arrived(arrivals_ptr, text, PROGRAMS):
        p = tl.arange(0, PP)
        values = tl.load(value_ptr + p, mask=p < PROGRAMS, other=_LOWEST, cache_modifier=".cg")
        indices = tl.load(index_ptr + p, mask=p < PROGRAMS, other=0, cache_modifier=".cg")
        highest, token = _best(values, indices)
        finite = (highest < _HIGHEST) & (highest > _LOWEST)
        if GREEDY:
            _take(token, finite, token_ptr, position_ptr, history_ptr, seen_ptr, V, SLOTS, PENALTY)
        else:
            lowest = tl.min(tl.load(value_ptr + PP + p, mask=p < PROGRAMS, other=_HIGHEST, cache_modifier=".cg"))
            highest = tl.where(finite, highest, 0.0)
            lowest = tl.where(finite, lowest, 0.0)
            tl.store(bracket_ptr, lowest)
            tl.store(bracket_ptr + 1, highest + tl.maximum(tl.abs(highest) * 1e-6, 1e-6))
            tl.store(bracket_ptr + 2, highest)
            tl.store(bracket_ptr + 3, tl.where(finite, 1.0, 0.0))


@triton.jit
def narrow(
    scores_ptr,
    settings_ptr,
    top_k_ptr,
    sums_ptr,
    bracket_ptr,
    arrivals_ptr,
    V,
    PROGRAMS,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    WAYS: tl.constexpr,
    MASS: tl.constexpr,
    FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One pass of the search for the highest threshold above which there are still top_k tokens; or, if MASS, a share
    top_p of the probability of what the search for top_k left, which is summed in the FIRST pass.

    bracket float32: the interval's ends, the highest score, whether logits are sound, the probability aimed at. Scratch
    of sums [PROGRAMS, WAYS]. In the first pass of MASS the interval is from where top_k's threshold is, or the score of
    a token e^-24 as probable as the best, up to the highest score.
    """
    let_in(PDL, True)
    take_turn(PDL, True)
    text = tl.program_id(1)
    scores_ptr += text * V
    settings_ptr += text * 4
    sums_ptr += text * (PROGRAMS * WAYS)
    bracket_ptr += text * 5
    inverse = tl.load(settings_ptr)
    low = tl.load(bracket_ptr)
    high = tl.load(bracket_ptr + 1)
    highest = tl.load(bracket_ptr + 2)
    if MASS and FIRST:
        low = tl.maximum(low, highest - 24.0 / inverse)
        high = highest + tl.maximum(tl.abs(highest) * 1e-6, 1e-6)
    way = tl.arange(0, WAYS)
    threshold = low + (high - low) * (way.to(tl.float32) / WAYS)
    parts = tl.zeros([PART, WAYS], dtype=tl.float32)
    for first in tl.static_range(0, BLOCK, PART):
        i = tl.program_id(0) * BLOCK + first + tl.arange(0, PART)
        x = tl.load(scores_ptr + i, mask=i < V, other=_LOWEST)
        weight = tl.exp((x - highest) * inverse) if MASS else tl.where(i < V, 1.0, 0.0)
        parts += tl.where(x[:, None] >= threshold[None, :], weight[:, None], 0.0)
    tl.store(sums_ptr + tl.program_id(0) * WAYS + way, tl.sum(parts, axis=0))
    if arrived(arrivals_ptr, text, PROGRAMS):
        parts = tl.zeros([PART, WAYS], dtype=tl.float32)
        for row in tl.range(0, PROGRAMS, PART):
            p = row + tl.arange(0, PART)[:, None]
            at = sums_ptr + p * WAYS + way[None, :]
            parts += tl.load(at, mask=p < PROGRAMS, other=0.0, cache_modifier=".cg")
        total = tl.sum(parts, axis=0)
        if MASS:
            if FIRST:
                aim = tl.max(total) * tl.load(settings_ptr + 2)  # all of it lies above the lowest threshold
                tl.store(bracket_ptr + 4, aim)
            else:
                aim = tl.load(bracket_ptr + 4)
        else:
            aim = tl.load(top_k_ptr + text).to(tl.float32)
        kept = tl.sum(tl.where((total >= aim) & (way > 0), 1, 0))  # thresholds rise: how many of them are low enough
        tl.store(bracket_ptr, tl.max(tl.where(way <= kept, threshold, low)))
        tl.store(bracket_ptr + 1, tl.min(tl.where(way > kept, threshold, high)))


@triton.jit
def draw(
    scores_ptr,
    seen_ptr,
    settings_ptr,
    seed_ptr,
    value_ptr,
    index_ptr,
    bracket_ptr,
    arrivals_ptr,
    token_ptr,
    position_ptr,
    history_ptr,
    V,
    SLOTS,
    PROGRAMS,
    BLOCK: tl.constexpr,
    PP: tl.constexpr,
    PENALTY: tl.constexpr,
    FILTERED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Take the token with the largest score / temperature + noise of those at or above all thresholds.

    seed int32 [2]: the low and the high half. The others as in ``begin`` and ``narrow``.
    """
    let_in(PDL, True)
    take_turn(PDL, True)
    program = tl.program_id(0)
    text = tl.program_id(1)
    scores_ptr += text * V
    settings_ptr += text * 4
    seed_ptr += text * 2
    value_ptr += text * (2 * PP)
    index_ptr += text * PP
    bracket_ptr += text * 5
    i = program * BLOCK + tl.arange(0, BLOCK)
    inverse = tl.load(settings_ptr)
    highest = tl.load(bracket_ptr + 2)
    x = tl.load(scores_ptr + i, mask=i < V, other=_LOWEST)
    kept = (i < V) & ((x - highest) * inverse >= tl.load(settings_ptr + 1))
    if FILTERED:
        kept = kept & (x >= tl.load(bracket_ptr))
    counter = i.to(tl.uint32, bitcast=True)
    zero = tl.zeros([BLOCK], dtype=tl.uint32)
    low = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    high = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    step = zero + tl.load(position_ptr + text).to(tl.uint32)
    bits, _, _, _ = tl.philox_impl(counter, step, zero, zero, zero + low, zero + high)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)  # inside (0, 1)
    noisy = tl.where(kept, (x - highest) * inverse - tl.log(-tl.log(uniform)), _LOWEST)
    best, at = _best(noisy, i)
    tl.store(value_ptr + program, best)
    tl.store(index_ptr + program, at)
    if arrived(arrivals_ptr, text, PROGRAMS):
        p = tl.arange(0, PP)
        values = tl.load(value_ptr + p, mask=p < PROGRAMS, other=_LOWEST, cache_modifier=".cg")
        indices = tl.load(index_ptr + p, mask=p < PROGRAMS, other=0, cache_modifier=".cg")
        _highest, token = _best(values, indices)
        _take(token, tl.load(bracket_ptr + 3) > 0.0, token_ptr, position_ptr, history_ptr, seen_ptr, V, SLOTS, PENALTY)
