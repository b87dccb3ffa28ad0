#!/usr/bin/env python3
"""Check and time the CUDA kernels on a GPU machine: ``PYTHONPATH=src python3 scripts/gpu_check.py [--tune]``.

1. ``pytest -m gpu`` on the kernels' tests.
2. One Markdown table: each kernel at the projections of three model shapes, its error against float64, its time (median
   of CUDA graph replays that rotate over enough weights to exceed L2), and its share of the copy bandwidth of this run.
3. With ``--tune``: every tile at every shape, the best one beside the one that the rule picks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton

from lbq.formats.packing import PackedWeight, packed_words
from lbq.runtime.bench.timing import Clock
from lbq.runtime.kernels import dense, dequant, gemv
from lbq.runtime.kernels.gemv import ArrangedWeight, Tile
from lbq.runtime.kernels.gemv.reference import gemv as float64_product
from lbq.runtime.kernels.gemv.tiles import codes_a_column

TESTS = Path(__file__).parents[1] / "tests/runtime/kernels"
TEST_FILES = [str(TESTS / f"test_{name}.py") for name in ("gemv", "dequant", "dense", "cuda_linear")]
SHAPES = {  # N, K: q/k/v fused, o, gate/up fused, down, head
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B head": (128256, 4096),
    "1.7B qkv": (4096, 2048),
    "1.7B o": (2048, 2048),
    "1.7B gate_up": (12288, 2048),
    "1.7B down": (2048, 6144),
    "1.7B head": (151936, 2048),
    "0.6B qkv": (4096, 1024),
    "0.6B o": (1024, 2048),
    "0.6B gate_up": (6144, 1024),
    "0.6B down": (1024, 3072),
}
GROUPS = {8: None, 4: 256, 3: 256}  # None: one scale a row
WIDE = [Tile(rows, 128 * warps, warps) for rows in (1, 2, 4, 8) for warps in (1, 2, 4, 8)]
NARROW = [Tile(r, c, w) for r in (4, 8, 16, 32) for c, w in ((32, 2), (32, 4), (64, 4), (64, 8), (128, 8))]
ROTATED_BYTES = 400_000_000  # several times the largest L2
CLOCK = Clock(torch.device("cuda"))
median_seconds = partial(CLOCK.seconds, replays=21, least=20)  # so many calls that a graph's own start does not count


def random_weight(n: int, k: int, bits: int) -> PackedWeight:
    words = torch.randint(-(2**31), 2**31 - 1, (n, packed_words(k, bits)), dtype=torch.int32, device="cuda")
    group = GROUPS[bits] or k
    return PackedWeight(words, (torch.randn(n, k // group, device="cuda") * 0.02).bfloat16(), bits, group, k)


def relative_error(y: torch.Tensor, y64: torch.Tensor) -> float:
    return float((y.double() - y64).norm() / y64.norm())


@dataclass
class Packed:
    """Copies of one packed shape, enough to exceed L2, and one token of activations."""

    weights: list[ArrangedWeight]
    x: gemv.Planes
    y: torch.Tensor
    error: float

    @staticmethod
    def make(n: int, k: int, bits: int, m: int = 1) -> Packed:
        x = torch.randn(m, k, device="cuda")
        planes = gemv.quantize(x, bits)
        first = random_weight(n, k, bits)
        y = torch.full((m, n), float("nan"), device="cuda")
        weights = [gemv.arrange(first)]
        gemv.gemv(planes, weights[0], out=y)
        rows = min(n, 4096)
        error = relative_error(y[:, :rows], float64_product(x, first.rows(0, rows)))
        error = error if bool(y.isfinite().all()) else float("nan")
        while len(weights) * weights[0].nbytes < ROTATED_BYTES or len(weights) < 2:
            weights.append(gemv.arrange(random_weight(n, k, bits)))
        return Packed(weights, planes, y, error)

    def seconds(self, tile: Tile | None = None, replays: int = 21) -> float:
        calls = [partial(gemv.gemv, self.x, w, out=self.y, tile=tile) for w in self.weights]
        return median_seconds(calls, replays=replays)


def time_dense(n: int, k: int) -> tuple[float, float]:
    """(seconds, error) of the BF16 matrix-vector kernel."""
    copies = max(2, -(-ROTATED_BYTES // (2 * n * k)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x, y = torch.randn(1, k, device="cuda"), torch.full((1, n), float("nan"), device="cuda")
    dense.gemv(x, weights[0], out=y)
    rows = min(n, 4096)
    error = relative_error(y[:, :rows], x.double() @ weights[0][:rows].double().t())
    return median_seconds([partial(dense.gemv, x, weight, out=y) for weight in weights]), error


def vectors(copy: float) -> None:
    """Batch 1 at every shape and width."""
    print("\n| one token, N×K | " + " | ".join(f"INT{b} g{GROUPS[b] or '=row'}" for b in GROUPS) + " | BF16 |")
    print("|---|" + "---|" * (len(GROUPS) + 1))
    for name, (n, k) in SHAPES.items():
        cells = []
        for bits in GROUPS:
            packed = Packed.make(n, k, bits)
            seconds = packed.seconds()
            share = packed.weights[0].nbytes / seconds / copy
            cells.append(f"{seconds * 1e6:.2f} µs {share:.0%} err {packed.error:.1e}")
            del packed
        seconds, error = time_dense(n, k)
        cells.append(f"{seconds * 1e6:.2f} µs {2 * n * k / seconds / copy:.0%} err {error:.1e}")
        print(f"| {name} {n}×{k} | " + " | ".join(cells) + " |", flush=True)
    for k in (1024, 4096, 14336):
        x = torch.randn(1, k, device="cuda")
        times = [f"INT{bits} {median_seconds([partial(gemv.quantize, x, bits)]) * 1e6:.2f} µs" for bits in GROUPS]
        print(f"activations into planes, K={k}: " + ", ".join(times))


def batches(copy: float) -> None:
    """Several tokens, prompts, and the passes over weights."""
    n, k = SHAPES["8B gate_up"]
    print("\n| 8B gate_up, tokens | " + " | ".join(f"INT{b}" for b in GROUPS) + " | BF16 torch |")
    print("|---|" + "---|" * (len(GROUPS) + 1))
    dense_weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    for m in (1, 2, 4, 8, 16, 128, 512, 2048):
        cells = []
        for bits in GROUPS:
            if m <= 16:
                packed = Packed.make(n, k, bits, m)
                seconds, error = packed.seconds(), packed.error
            else:
                seconds, error = prompt(n, k, bits, m)
            cells.append(f"{seconds * 1e6:.1f} µs err {error:.1e}")
        x16 = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        seconds = median_seconds([partial(torch.nn.functional.linear, x16, dense_weight)])
        print(f"| {m} | " + " | ".join(cells) + f" | {seconds * 1e6:.1f} µs |", flush=True)
    passes = []
    for bits in GROUPS:
        weight = random_weight(n, k, bits)
        arranged = gemv.arrange(weight)
        tile = torch.empty((8192, k), dtype=torch.float16, device="cuda")
        norms = dequant.row_norms(arranged)
        seconds = median_seconds([partial(dequant.dequantize, arranged, 0, 8192, tile, norms)])
        moved = tile.nbytes + arranged.nbytes * 8192 // n
        passes.append(f"dequantise INT{bits} {moved / seconds / copy:.0%}")
        if bits == 3:
            seconds = median_seconds([partial(gemv.arrange, weight)])
            passes.append(f"3-bit planes {2 * weight.words.nbytes / seconds / copy:.0%}")
    print("share of copy: " + ", ".join(passes))


def prompt(n: int, k: int, bits: int, m: int) -> tuple[float, float]:
    """(seconds, error) of the prompt path."""
    weight = random_weight(n, k, bits)
    arranged = gemv.arrange(weight)
    norms = dequant.row_norms(arranged)
    x = torch.randn(m, k, device="cuda")
    y = dequant.matmul(x, arranged, norms)
    error = relative_error(y[:, :4096], float64_product(x, weight.rows(0, 4096)))
    return median_seconds([partial(dequant.matmul, x, arranged, norms)], replays=5), error


def _compile(job: tuple[int, int, Tile]) -> None:
    """Puts one tile's kernel into Triton's cache; N does not matter to it."""
    k, bits, tile = job
    x = torch.randn(1, k, device="cuda")
    gemv.gemv(gemv.quantize(x, bits), gemv.arrange(random_weight(8, k, bits)), tile=tile)


def _tiles(k: int, bits: int) -> list[Tile]:
    """Tiles that idle under half of their threads, and whose unrolled steps stay few."""
    columns = -(-k // codes_a_column(bits))
    tiles = [t for t in WIDE + NARROW if t.columns < 2 * columns or t.columns == 32]
    return [t for t in tiles if t.rows * t.columns // (32 * t.warps) * -(-columns // t.columns) <= 128]


def label(tile: Tile) -> str:
    return f"{tile.rows}×{tile.columns}/{tile.warps}"


def tune(copy: float) -> None:
    """Every tile at every shape; kernels are compiled on all cores first."""
    jobs = {(k, bits, tile) for _, k in SHAPES.values() for bits in GROUPS for tile in _tiles(k, bits)}
    with multiprocessing.get_context("spawn").Pool(min(12, os.cpu_count() or 1)) as pool:
        pool.map(_compile, sorted(jobs, key=str), chunksize=4)
    sms = gemv.sm_count(torch.device("cuda", torch.cuda.current_device()))
    print("\n| shape | bits | best four: rows×columns/warps | rule |\n|---|---|---|---|")
    for name, (n, k) in SHAPES.items():
        for bits in GROUPS:
            packed = Packed.make(n, k, bits)
            share = packed.weights[0].nbytes / copy
            times = sorted((packed.seconds(tile, 5), str(i), tile) for i, tile in enumerate(_tiles(k, bits)))
            best = ", ".join(f"{label(tile)} {t * 1e6:.2f} µs {share / t:.0%}" for t, _, tile in times[:4])
            rule = gemv.tile(n, k, bits, sms)
            seconds = packed.seconds(rule, 5)
            print(
                f"| {name} {n}×{k} | {bits} | {best} | {label(rule)} {seconds * 1e6:.2f} µs {share / seconds:.0%} |",
                flush=True,
            )
            del packed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try every tile at every shape")
    parser.add_argument("--no-tests", action="store_true", help="skip pytest")
    parser.add_argument("--no-times", action="store_true", help="skip the tables of the rule's own tiles")
    arguments = parser.parse_args()
    failed = 0
    if not arguments.no_tests:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
        failed = subprocess.run([*command, "--maxfail=8", f"--confcutdir={TESTS}", *TEST_FILES]).returncode
    copy = CLOCK.copy_bandwidth()
    print(f"\n{torch.cuda.get_device_name()}: copy {copy / 1e12:.3f} TB/s, torch {torch.__version__}, ", end="")
    print(f"Triton {triton.__version__}, weights rotate over {ROTATED_BYTES / 1e6:.0f} MB", flush=True)
    if not arguments.no_times:
        vectors(copy)
        batches(copy)
    if arguments.tune:
        tune(copy)
    return failed


if __name__ == "__main__":
    sys.exit(main())
