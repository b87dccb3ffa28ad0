"""The tensor-core assembly of ``batch``, executed lane by lane as the PTX manual defines its instructions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lbq.runtime.kernels.batch.triton import _assembly
from lbq.runtime.kernels.gemv.triton import _NIBBLES

LANES = np.arange(32)
GROUP, THREAD = LANES // 4, LANES % 4  # how a load of [16, 8] leaves it: four threads a row, eight rows


def bytes_of(words: np.ndarray) -> np.ndarray:
    """int8 [..., 4] of int32 [...]."""
    words = np.asarray(words)
    return words.reshape(-1).astype("<i4").view(np.int8).reshape(*words.shape, 4).astype(np.int64)


def mma(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """m16n8k32 of s8 (PTX ISA, "Matrix fragments for mma.m16n8k32"): registers of 32 lanes in, registers out."""
    matrix_a, matrix_b = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
    for lane in LANES:
        g, t = GROUP[lane], THREAD[lane]
        for register, (row, column) in enumerate(((g, 0), (g + 8, 0), (g, 16), (g + 8, 16))):
            matrix_a[row, column + 4 * t : column + 4 * t + 4] = bytes_of(a[register][lane])
        for register, row in enumerate((0, 16)):
            matrix_b[row + 4 * t : row + 4 * t + 4, g] = bytes_of(b[register][lane])
    d = matrix_a @ matrix_b
    places = [(GROUP, 2 * THREAD), (GROUP, 2 * THREAD + 1), (GROUP + 8, 2 * THREAD), (GROUP + 8, 2 * THREAD + 1)]
    return [d[place] + old for place, old in zip(places, c, strict=True)]


def execute(text: str, operands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The few instructions that the assembly uses."""
    registers = {**operands, "%laneid": LANES}
    for line in re.sub(r"^\{|\}$", "", text.strip()).split(";"):
        words = re.findall(r"[a-z][\w.]*|[$%]\w+|0x[0-9a-f]+|-?\d+", line)
        if not words or line.strip().startswith(".reg"):
            continue
        values = [registers[w] if w in registers else np.full(32, int(w, 0)) if w[0].isdigit() else None for w in words]
        if words[0].startswith("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"):
            results = mma(values[5:9], values[9:11], values[11:15])
            registers.update(zip(words[1:5], results, strict=True))
            continue
        registers[words[1]] = {
            "mad.lo.s32": lambda a, b, c: a * b + c,
            "mul.f32": lambda a, b: a * b,
            "fma.rn.f32": lambda a, b, c: a * b + c,
            "shl.b32": lambda a, b: a << b,
            "xor.b32": lambda a, b: a ^ b,
            "lop3.b32": lop3,
            "and.b32": lambda a, b: a & b,
            "shr.u32": lambda a, b: a >> b,
            "setp.eq.u32": lambda a, b: a == b,
            "selp.b32": lambda a, b, c: np.where(c, a, b),
            "mov.b32": lambda a: a,
            "mov.u32": lambda a: a,
            "cvt.rn.f32.s32": lambda a: a,
        }[words[0]](*values[2:])
    return registers


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit by bit what ``table`` has at the three bits."""
    bits = np.arange(32)
    index = sum(((x[:, None] >> bits) & 1) << place for place, x in zip((2, 1, 0), (a, b, c), strict=True))
    return ((table[:, None] >> index & 1) << bits).sum(axis=1)


@pytest.mark.parametrize("four", range(4))
@pytest.mark.parametrize(("bits", "parts"), [(4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)])
def test_products_of_a_tile_by_four_tokens(bits: int, parts: int, four: int) -> None:
    random = np.random.default_rng(bits)
    halves = 8 // bits
    # Opened words [halves, 16 words, 8 rows] of two blocks of rows, and planes [halves, 16 words, 8 = 4 tokens × 2].
    low, high, x = (random.integers(-(2**31), 2**31, (halves, 16, 8)).astype(np.int64) for _ in range(3))
    text, constraints = _assembly(bits, parts, four)
    assert constraints == ",".join(["=&f"] * 8 + ["r"] * 12 * halves + ["f"] * 20)
    operands, number = {}, 8
    for tensor in (low, high, x):
        for half in range(halves):
            for i in range(4):  # a thread's four words, as a load of 16 bytes leaves them
                operands[f"${number}"] = tensor[half, 4 * THREAD + i, GROUP]
                number += 1
    # Whole numbers, so that sums are exact: scales of both rows' parts, those of tokens, and what was summed before.
    scales, tokens, before = (random.integers(1, 9, (n, 32)) for n in (8, 4, 8))
    operands |= {f"${number + i}": value for i, value in enumerate([*scales, *tokens, *before])}
    results = execute(text, operands)
    for first, rows in ((0, low), (4, high)):
        added = 0
        for part in range(parts):
            its = slice(16 // parts * part, 16 // parts * (part + 1))  # the words of this part
            sums = np.einsum("hkgb,hknb->gn", bytes_of(rows)[:, its], bytes_of(x)[:, its])
            both = sums[:, 0::2] * 254 + sums[:, 1::2]  # [8 rows, 4 tokens]
            added += both[GROUP, THREAD] * scales[first + part] * tokens[four]
        for i in range(4):
            expected = before[first + i] + (added if i == four else 0)
            assert np.array_equal(results[f"${first + i}"], expected)


@pytest.mark.parametrize("half", [0, 1])
def test_nibbles_are_opened_in_one_operation(half: int) -> None:
    words = np.random.default_rng(1).integers(-(2**31), 2**31, 32)
    shifted = words << (4 - 4 * half)
    opened = bytes_of(execute(_NIBBLES.value, {"$1": shifted})["$0"] & 0xFFFFFFFF)
    codes = words[:, None] >> (8 * np.arange(4) + 4 * half) & 15
    assert np.array_equal(opened, (codes - 8) * 16)
