"""The CPU's linears against float64 on the same codes and scales."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lbq.formats.packing import GROUPS, PackedWeight, pack
from lbq.runtime.kernels import cpu
from lbq.runtime.kernels.cpu import DenseLinear, bags, cpu_linear, dense, int4, int8, mapped

WIDTHS = (192, 576, 896, 1009, 1536, 4096, 4304, 4864, 14336)
# The contract is 2e-4; float32 sums do far better, and a kernel that rounds to 16 bits would not pass.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN or the largest integer; one thread, so that a busy machine stays quick."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def make_weight(n: int, k: int, bits: int, group: int, seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.randn(n, k // group, generator=generator) * 0.02).bfloat16()
    return PackedWeight(pack(codes, bits), scales, bits, group, k)


def make_input(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m * k))


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    wanted = x.double() @ weight.double().t()
    if bias is not None:
        wanted += bias.double()
    assert y.dtype == torch.float32
    assert y.shape == wanted.shape
    assert y.is_contiguous()
    assert ((y.double() - wanted).norm() / wanted.norm()).item() <= TOLERANCE


def groups_of(k: int) -> list[int]:
    return [g for g in GROUPS if k % g == 0 and g < k] + [k]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("k", WIDTHS)
def test_every_group_matches_float64(k: int, bits: int) -> None:
    for group in groups_of(k):
        weight = make_weight(37, k, bits, group)
        linear = cpu_linear(weight)
        assert linear.fallback is None
        for m in (1, 3, bags.ROWS_BY_BAGS + 2):
            x = make_input(m, k)
            check(linear(x), x, weight.dequantize(torch.float64))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 32, 32), (2, 1, 1), (5, 33, 33), (37, 1536, 512), (640, 576, 64)])
def test_exact_mode_matches_float64(n: int, k: int, group: int, bits: int) -> None:
    weight = make_weight(n, k, bits, group)
    bias = torch.randn(n)
    for m in (1, 4):
        x = make_input(m, k)
        linear = cpu_linear(weight, bias, exact=True)
        assert linear.fallback is None
        assert linear.resident_bytes == 0
        check(linear(x), x, weight.dequantize(torch.float64), bias)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 1), (2, 3, 3), (9, 33, 33), (3, 14336, 512), (1000, 32, 32)])
def test_smallest_and_odd_shapes(n: int, k: int, group: int, bits: int) -> None:
    weight = make_weight(n, k, bits, group)
    bias = torch.randn(n)
    for m in (1, 2, bags.ROWS_BY_BAGS + 1):
        x = make_input(m, k)
        check(cpu_linear(weight, bias)(x), x, weight.dequantize(torch.float64), bias)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("m", [1, 20])
def test_several_shards(monkeypatch: pytest.MonkeyPatch, bits: int, m: int) -> None:
    monkeypatch.setattr(int4, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(int4, "NARROWEST", 48)
    monkeypatch.setattr(int8, "COLUMNS", 32)
    monkeypatch.setattr(int8, "SUMS", 700)
    weight = make_weight(305, 192, bits, 64)
    bias = torch.randn(305)
    x = make_input(m, 192)
    check(cpu_linear(weight, bias)(x), x, weight.dequantize(torch.float64), bias)


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_number_of_threads(bits: int, threads: int) -> None:
    for k, group in ((576, 64), (1536, 512), (1009, 1009), (3, 3)):  # enough bags, too few, one
        weight = make_weight(96, k, bits, group)
        torch.set_num_threads(threads)
        linear = cpu_linear(weight)
        torch.set_num_threads(2)
        assert k < 64 or linear.resident_bytes <= 1.15 * weight.nbytes
        for m in (1, bags.ROWS_BY_BAGS + 1):
            x = make_input(m, k)
            check(linear(x), x, weight.dequantize(torch.float64))


@pytest.mark.parametrize("k", [1, 3, 32, 576, 1009, 4864])
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
def test_bags_end_where_a_threads_rows_end(k: int, threads: int) -> None:
    for group in groups_of(k):
        plan = bags.aligned_bags(k, group, threads)
        offsets, owners = plan.offsets.tolist(), plan.group_of.tolist()
        assert len(owners) % threads == 0
        each = len(owners) // threads
        table = k + k % 2
        assert offsets[::each] == [min(k, round(table * t / threads)) for t in range(threads + 1)]
        covered = [(row, owners[b]) for b in range(len(owners)) for row in range(offsets[b], offsets[b + 1])]
        assert covered == [(row, row // group) for row in range(k)]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups_of_zeros_and_the_extreme_codes(bits: int) -> None:
    k, group = 256, 32
    codes = torch.full((24, k), (1 << bits) - 1, dtype=torch.uint8)
    codes[:, ::2] = 0
    scales = torch.full((24, k // group), -0.5).bfloat16()
    scales[:, 3] = 0
    weight = PackedWeight(pack(codes, bits), scales, bits, group, k)
    x = make_input(2, k)
    check(cpu_linear(weight)(x), x, weight.dequantize(torch.float64))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(257, 576), (576, 4096), (1025, 320)])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_resident_bytes_stay_within_the_bound(n: int, k: int, bits: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for group in groups_of(k):
        weight = make_weight(n, k, bits, group)
        assert cpu_linear(weight).resident_bytes <= (1.5 if bits == 3 else 1.15) * weight.nbytes


def test_scratch_tables_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "MOST_TABLES", 2)
    int4._pool.tables.clear()
    weights = [make_weight(n, 64, 4, 32) for n in (16, 24, 40)]
    for weight in [*weights, weights[0]]:
        x = make_input(1, 64)
        check(cpu_linear(weight)(x), x, weight.dequantize(torch.float64))
        assert 1 <= len(int4._pool.tables) <= 2


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_repacked_weight_is_let_go(bits: int) -> None:
    weight = make_weight(64, 128, bits, 32)
    matrix = torch.randn(64, 128).bfloat16()
    refs = [weakref.ref(t) for t in (weight.words, weight.scales, matrix)]
    linears = [cpu_linear(weight), DenseLinear(matrix)]
    del weight, matrix
    gc.collect()
    assert [ref() for ref in refs] == [None, None, None]
    assert linears[0](torch.ones(1, 128)).shape == (1, 64)


class Largest(TorchDispatchMode):
    """The most bytes that one tensor made inside took; views count as nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_no_matrix_becomes_float32_as_a_whole(bits: int, exact: bool) -> None:
    weight = make_weight(8192, 1024, bits, 128)  # 32 MiB of float32
    with Largest() as built:
        linear = cpu_linear(weight, exact=exact)
    with Largest() as called:
        linear(make_input(1, 1024))
    assert built.bytes <= max(linear.resident_bytes, int4.SCRATCH_BYTES)
    assert called.bytes <= max(linear.resident_bytes if bits == 8 else 0, 2 * int4.SCRATCH_BYTES)


def test_no_dense_matrix_becomes_float32_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK", 1 << 16)
    weight = torch.randn(1001, 1024).bfloat16()
    bias = torch.randn(1001)
    with Largest() as built:
        linear = DenseLinear(weight, bias)
    assert 0 < built.bytes <= 4 << 16
    x = make_input(3, 1024)
    check(linear(x), x, weight, bias)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (37, 576), (640, 1009), (5, 14336)])
def test_dense_matches_float64(n: int, k: int, exact: bool) -> None:
    weight = (torch.randn(n, k) * 0.02).bfloat16()
    bias = torch.randn(n)
    linear = DenseLinear(weight, bias, exact=exact)
    assert linear.fallback is None
    for m in (1, 2, 17):
        x = make_input(m, k)
        check(linear(x), x, weight, bias)
    check(DenseLinear(weight, exact=exact)(x), x, weight)


def test_exact_takes_float32_weights_as_they_are() -> None:
    weight, x = torch.randn(37, 576) * 0.02, make_input(3, 576)
    linear = DenseLinear(weight, exact=True)
    check(linear(x), x, weight)
    assert not torch.equal(linear(x), DenseLinear(weight.bfloat16(), exact=True)(x))
    assert linear.resident_bytes == weight.nbytes
    with pytest.raises(AssertionError):
        DenseLinear(weight)


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e6, 1e30])
def test_dense_survives_what_fp16_cannot_hold(size: float) -> None:
    weight = (torch.randn(16, 64).clamp(-4, 4) * size).bfloat16()
    weight[:, 0] *= 2**-12
    x = make_input(2, 64)
    y = DenseLinear(weight)(x)
    assert y.isfinite().all()
    check(y, x, weight)


def test_dense_zeros_stay_zero() -> None:
    assert DenseLinear(torch.zeros(3, 32).bfloat16())(torch.ones(2, 32)).tolist() == [[0.0] * 3] * 2


def test_threads_do_not_share_scratch() -> None:
    weights = [make_weight(256, 576, 4, 64, seed) for seed in range(4)]
    linears = [cpu_linear(w) for w in weights]
    x = make_input(1, 576)
    failed: list[int] = []

    def work(i: int) -> None:
        wanted = x @ weights[i].dequantize().t()
        if not all(torch.allclose(linears[i](x), wanted, atol=1e-4) for _ in range(100)):
            failed.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.parametrize("bits", [4, 8])
def test_inference_mode_leaves_nothing_behind(bits: int) -> None:
    weight = make_weight(40, 224, bits, 32)
    x = make_input(1, 224)
    with torch.inference_mode():
        linears = [cpu_linear(weight), DenseLinear(weight.dequantize().bfloat16())]
        first = [linear(x) for linear in linears]
    assert all(torch.equal(linear(x), y) for linear, y in zip(linears, first, strict=True))


def test_without_fbgemm_the_mapped_file_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cpu, dense):
        monkeypatch.setattr(module, "missing_fbgemm", lambda: "no FBGEMM here")
    weight = make_weight(37, 192, 3, 64)
    matrix = torch.randn(37, 192).bfloat16()
    x = make_input(2, 192)
    linears = [cpu_linear(weight), DenseLinear(matrix)]
    assert [linear.fallback for linear in linears] == ["no FBGEMM here"] * 2
    assert "mapped" in linears[0].kernel
    check(linears[0](x), x, weight.dequantize(torch.float64))
    check(linears[1](x), x, matrix)
    assert isinstance(linears[0], mapped.MappedLinear)
    assert cpu_linear(weight, exact=True).fallback is None


def test_kernels_have_names() -> None:
    names = {cpu_linear(make_weight(8, 32, bits, 32)).kernel for bits in (3, 4, 8)}
    assert len(names) == 3
    assert all("FBGEMM" in name for name in names)
