#!/usr/bin/env python3
"""Time lbq's CPU linears beside what else torch offers: microseconds, GB/s of weights, error against float64.

    python scripts/bench_cpu_kernels.py --threads 2              # the linears of SmolLM2-135M, one token
    python scripts/bench_cpu_kernels.py --shape 4096x4096 --tokens 64
    python scripts/bench_cpu_kernels.py --chain                  # all linears of a token, in their order

Weights are rotated through more memory than the caches hold. Times are the median and the fastest of the runs: on a
machine that does other work, the fastest is nearer to the truth.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lbq.formats.packing import PackedWeight, pack
from lbq.runtime.kernels.cpu import DenseLinear, cpu_linear

COLD_BYTES = 96 << 20
LAYERS = 30
# SmolLM2-135M: (N, K, bits, group, times a token)
SMOLLM2 = (
    (960, 576, 4, 64, LAYERS),
    (576, 576, 4, 64, LAYERS),
    (3072, 576, 4, 64, LAYERS),
    (576, 1536, 4, 256, LAYERS),
    (49152, 576, 8, 576, 1),
)

Gemm = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One random matrix with negative scales."""

    weight: PackedWeight
    codes: torch.Tensor  # uint8 [N, K]
    dense: torch.Tensor  # float32 [N, K]

    @staticmethod
    def make(n: int, k: int, bits: int, group: int) -> Case:
        codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
        scales = (torch.randn(n, k // group) * 0.02).bfloat16()
        weight = PackedWeight(pack(codes, bits), scales, bits, group, k)
        return Case(weight, codes, weight.dequantize())


@dataclass(frozen=True)
class Candidate:
    name: str
    build: Callable[[Case], tuple[Gemm, int]]  # the product, and the bytes of its weights
    bits: tuple[int, ...]


def _linear(case: Case) -> tuple[Gemm, int]:
    linear = cpu_linear(case.weight)
    return linear, linear.resident_bytes


def _exact(case: Case) -> tuple[Gemm, int]:
    return cpu_linear(case.weight, exact=True), case.weight.nbytes


def _dense(case: Case) -> tuple[Gemm, int]:
    linear = DenseLinear(case.dense.bfloat16())
    return linear, linear.resident_bytes


def _bf16(case: Case) -> tuple[Gemm, int]:
    weight = case.dense.bfloat16()
    return lambda x: torch.nn.functional.linear(x.bfloat16(), weight).float(), weight.nbytes


def _bf16_high_low(case: Case) -> tuple[Gemm, int]:
    weight = case.dense.bfloat16()

    def run(x: torch.Tensor) -> torch.Tensor:
        high = x.bfloat16()
        both = torch.cat((high, (x - high).bfloat16()))
        return torch.nn.functional.linear(both, weight).float().view(2, x.shape[0], -1).sum(0)

    return run, weight.nbytes


def _float32(case: Case) -> tuple[Gemm, int]:
    weight = case.dense.clone()
    return lambda x: torch.nn.functional.linear(x, weight), weight.nbytes


def _int4pack(dtype: torch.dtype) -> Callable[[Case], tuple[Gemm, int]]:
    def build(case: Case) -> tuple[Gemm, int]:
        w = case.weight
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(case.codes.int(), 1)
        scales = w.scales.to(dtype).t()
        both = torch.stack((scales, torch.zeros_like(scales)), 2).contiguous()

        def run(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(dtype), packed, w.group, both)
            return y.float()

        return run, packed.nbytes + both.nbytes

    return build


def _int8pack(dtype: torch.dtype) -> Callable[[Case], tuple[Gemm, int]]:
    def build(case: Case) -> tuple[Gemm, int]:
        codes = (case.codes ^ 128).view(torch.int8)
        scales = case.weight.scales[:, 0].to(dtype)

        def run(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x.to(dtype), codes, scales)
            return y.float()

        return run, codes.nbytes

    return build


def _int8_planes(case: Case) -> tuple[Gemm, int]:
    """Two int8 planes of the activations through oneDNN's int8 matmul."""
    codes = (case.codes ^ 128).view(torch.int8)
    scales = case.weight.scales[:, 0].float()

    def run(x: torch.Tensor) -> torch.Tensor:
        unit = x.abs().amax(1, keepdim=True) / 127
        first = (x / unit).round()
        second = ((x / unit - first) * 254).round()
        sums = torch._int_mm(torch.cat((first, second)).to(torch.int8), codes.t()).float()
        high, low = sums.view(2, x.shape[0], -1)
        y: torch.Tensor = (high + low / 254) * unit * scales
        return y

    return run, codes.nbytes


def _bag4(case: Case) -> tuple[Gemm, int]:
    """FBGEMM's own 4-bit bag: runs on one thread."""
    w = case.weight
    pairs = case.codes.t()[:, 0::2] | (case.codes.t()[:, 1::2] << 4)
    header = torch.tensor([1.0, -8.0], dtype=torch.float16).view(torch.uint8)
    table = torch.cat((pairs, header.expand(w.k, 4)), 1).contiguous()
    scales = w.scales.float().t().contiguous()
    indices, offsets = torch.arange(w.k), torch.arange(0, w.k + 1, w.group)
    bag = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets.default

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = [bag(table, indices, offsets, False, 0, False, row, None, True).mul_(scales).sum(0) for row in x]
        return torch.stack(rows)

    return run, table.nbytes + scales.nbytes


CANDIDATES = (
    Candidate("lbq", _linear, (3, 4, 8)),
    Candidate("lbq, dense BF16", _dense, (3, 4, 8)),
    Candidate("lbq, exact", _exact, (3, 4, 8)),
    Candidate("torch BF16 matmul", _bf16, (3, 4, 8)),
    Candidate("torch BF16 matmul, high + low x", _bf16_high_low, (3, 4, 8)),
    Candidate("torch float32 matmul", _float32, (3, 4, 8)),
    Candidate("FBGEMM 4-bit bag", _bag4, (4,)),
    Candidate("int4pack, BF16", _int4pack(torch.bfloat16), (4,)),
    Candidate("int4pack, fp16", _int4pack(torch.float16), (4,)),
    Candidate("int4pack, float32", _int4pack(torch.float32), (4,)),
    Candidate("int8pack, BF16", _int8pack(torch.bfloat16), (8,)),
    Candidate("int8pack, float32", _int8pack(torch.float32), (8,)),
    Candidate("oneDNN int8, two planes of x", _int8_planes, (8,)),
)


def seconds(run: Callable[[], object], limit: float) -> tuple[float, float]:
    """Median and least time of a call; stops after ``limit`` seconds, not before ten calls."""
    run()
    times: list[float] = []
    end = time.perf_counter() + limit
    while len(times) < 10 or (time.perf_counter() < end and len(times) < 500):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times)


def rotate(gemms: list[Gemm]) -> Iterator[Gemm]:
    while True:
        yield from gemms


def bench_shape(n: int, k: int, bits: int, group: int, tokens: int, limit: float) -> None:
    case = Case.make(n, k, bits, group)
    x = torch.randn(tokens, k)
    wanted = x.double() @ case.dense.double().t()
    print(f"\n[{n}, {k}] INT{bits} g{group}, M={tokens}")
    for candidate in CANDIDATES:
        whole_row = "int8" in candidate.name and group != k
        unfit = candidate.name.startswith("int4pack") and (n % 16 or group not in (32, 64, 128, 256))
        if bits not in candidate.bits or whole_row or unfit:
            continue
        run, size = candidate.build(case)
        error = ((run(x).double() - wanted).norm() / wanted.norm()).item()
        copies = [run] + [candidate.build(case)[0] for _ in range(min(200, COLD_BYTES // size))]
        turn = rotate(copies)
        middle, least = seconds(lambda turn=turn: next(turn)(x), limit)  # type: ignore[misc]
        print(
            f"  {candidate.name:32s} {middle * 1e6:9.1f} us  best {least * 1e6:9.1f} us"
            f"  {size / least / 1e9:6.1f} GB/s  x{size / case.weight.nbytes:.3f} bytes  error {error:.1e}"
        )


def bench_chain(limit: float) -> None:
    """Every linear of a token, in order, each with weights of its own."""
    for name, build in (("lbq INT4, head INT8", _linear), ("lbq, dense BF16", _dense), ("torch BF16 matmul", _bf16)):
        calls = [
            (build(Case.make(n, k, bits, group))[0], torch.randn(1, k))
            for n, k, bits, group, times in SMOLLM2
            for _ in range(times)
        ]
        layers = [calls[i + j * LAYERS] for i in range(LAYERS) for j in range(4)] + calls[-1:]

        def token(layers: list[tuple[Gemm, torch.Tensor]] = layers) -> None:
            for run, x in layers:
                run(x)

        middle, least = seconds(token, limit)
        print(f"  {name:32s} {middle * 1e3:7.2f} ms  best {least * 1e3:7.2f} ms a token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--shape", help="NxK instead of the shapes of SmolLM2-135M")
    parser.add_argument("--bits", type=int, default=4, choices=(3, 4, 8))
    parser.add_argument("--group", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.5, help="a candidate's time")
    parser.add_argument("--chain", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}", end="")
    print(f", {torch.get_num_threads()} threads")
    with torch.inference_mode():
        if options.chain:
            bench_chain(4 * options.seconds)
        elif options.shape:
            n, k = (int(part) for part in options.shape.split("x"))
            bench_shape(n, k, options.bits, options.group, options.tokens, options.seconds)
        else:
            for n, k, bits, group, _ in SMOLLM2:
                bench_shape(n, k, bits, group, options.tokens, options.seconds)


if __name__ == "__main__":
    main()
