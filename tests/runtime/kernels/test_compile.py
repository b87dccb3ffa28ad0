"""Every kernel compiles for the GPUs that matter, without one: no spills, little shared memory, 16-byte loads."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lbq.runtime import turn
from lbq.runtime.ahead import PROMPTS, Job
from lbq.runtime.bench.shapes import SHAPES as MODELS
from lbq.runtime.bench.weights import RandomWeights
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.tables import Table, shipped
from lbq.runtime.kernels.attention import Heads, _together, packed, shared_memory, short, split_for
from lbq.runtime.kernels.attention import triton as attention
from lbq.runtime.kernels.batch import BatchTile, tile_for
from lbq.runtime.kernels.batch import triton as batch
from lbq.runtime.kernels.dense import triton as dense
from lbq.runtime.kernels.dequant import triton as dequant
from lbq.runtime.kernels.gemv import ArrangedWeight, Tile, plane_columns, tile
from lbq.runtime.kernels.gemv import triton as gemv
from lbq.runtime.kernels.gemv.tiles import codes_a_column
from lbq.runtime.kernels.gpu import LEAST_SHARED, Gpu
from lbq.runtime.kernels.planes import triton as planes
from lbq.runtime.kernels.project import triton as project
from lbq.runtime.kernels.prompt import attention_tile
from lbq.runtime.kernels.prompt import triton as prompt
from lbq.runtime.kernels.sample import triton as sample
from lbq.runtime.launches import Kernel, kernels_of, standing_in
from lbq.runtime.text.sampling import SamplingOptions

pytestmark = pytest.mark.skipif(gemv.INTERPRETED, reason="the interpreter compiles nothing")

# Multiprocessors of one GPU of each capability: the tile rule follows them. A100, RTX 3060, 4060, H200, 5050.
SM_COUNTS = {80: 108, 86: 28, 89: 24, 90: 132, 120: 20}
# N, K of the projections of an 8B, a 0.6B and a 135M model
SHAPES = [(28672, 4096), (4096, 14336), (12288, 2048), (6144, 1024), (576, 576)]
VECTOR = ".v4.b32"


def _compile(
    kernel: Any,
    capability: int,
    warps: int,
    types: dict[str, str],
    constants: dict[str, Any],
    sizes: tuple[str, ...] = (),
) -> Any:
    """``kernel`` for sm_``capability``; pointers are 16-byte aligned, as torch's allocations are, and ``sizes`` are of
    sixteens."""
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in sizes
    }
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    assert list(signature) == kernel.arg_names
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def _check(compiled: Any, tmp_path: Path, shared_limit: int = LEAST_SHARED, stack: int = 0) -> list[str]:
    """No spills past ``stack`` bytes, bounded shared memory; returns the global loads of the PTX."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    spilled = [int(nbytes) for nbytes in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)]
    assert len(spilled) == 2, usage
    assert max(spilled) <= stack, usage
    assert int(re.findall(r"REG:(\d+)", usage)[0]) <= 255
    assert compiled.metadata.shared <= shared_limit
    return re.findall(r"ld\.global\S*", compiled.asm["ptx"])


def _gemv(n: int, k: int, bits: int, group: int, capability: int) -> Any:
    chosen = tile(n, k, bits, SM_COUNTS[capability])
    types = {"w_ptr": "*i32", "s_ptr": "*bf16", "q_ptr": "*i32", "xs_ptr": "*fp32", "bias_ptr": "*fp32"}
    types |= {"y_ptr": "*fp32", "N": "i32", "M": "i32"}
    constants = {
        "K": k,
        "G": group,
        "BITS": bits,
        "XC": plane_columns(k, bits),
        "BN": chosen.rows,
        "BW": chosen.columns,
        "HAS_BIAS": True,
        "EMULATE": False,
    }
    return _compile(gemv.gemv, capability, chosen.warps, types, constants)


@pytest.mark.parametrize("capability", SM_COUNTS)
@pytest.mark.parametrize(("bits", "group"), [(3, 128), (4, 256), (8, None)])
def test_gemv(bits: int, group: int | None, capability: int, tmp_path: Path) -> None:
    for n, k in SHAPES:
        compiled = _gemv(n, k, bits, k if group is None else min(group, 64 if k == 576 else group), capability)
        # Weights, scales and activations share a layout: shared memory serves the last sum over warps alone. So it is
        # with Triton 3.6; 3.7.1 moves INT3's and some INT4's scales through it, which costs a little and fits.
        loads = _check(compiled, tmp_path, shared_limit=512 if triton.__version__ < "3.7" else 4096)
        weights = [load for load in loads if "evict_first" in load]
        assert weights
        if k * bits % 512 == 0:  # rows are whole 16-byte words
            assert all(VECTOR in load for load in weights), loads
            assert sum(VECTOR in load for load in loads) > len(weights)  # the activations too
        assert "dp4a.s32.s32" in compiled.asm["ptx"]


@pytest.mark.parametrize("kernel", [gemv.gemv, dense.gemv])
def test_one_compilation_for_any_number_of_rows_and_tokens(kernel: Any) -> None:
    assert {p.name for p in kernel.params if p.do_not_specialize} == {"N", "M"}


@pytest.mark.parametrize("capability", SM_COUNTS)
def test_the_other_kernels(capability: int, tmp_path: Path) -> None:
    types = {"x_ptr": "*fp32", "q_ptr": "*i32", "s_ptr": "*fp32", "K": "i32", "BLOCKS": "i32", "XC": "i32"}
    for bits in (3, 4, 8):
        constants = {"C": codes_a_column(bits), "FOLD": 2.0 ** (bits - 8), "BB": 16, "SIZE": 32}
        _check(_compile(gemv.quantize, capability, 4, types, constants), tmp_path)
    types = {"src_ptr": "*i32", "dst_ptr": "*i32", "COUNT": "i32", "WORDS": "i32", "COLS": "i32"}
    _check(_compile(gemv.split_planes, capability, 4, types, {"BT": 256}), tmp_path)
    types = {"w_ptr": "*i32", "s_ptr": "*bf16", "norm_ptr": "*fp32", "out_ptr": "*fp16"}
    types |= dict.fromkeys(("ROWS", "K", "WORDS", "GROUPS"), "i32")
    for bits in (3, 4, 8):
        constants = {"G": 0 if bits == 8 else 128, "BITS": bits, "RELATIVE": True, "BN": 4}
        constants |= {"BW": 4096 // codes_a_column(bits)}
        compiled = _compile(dequant.dequantize, capability, 4, types, constants, sizes=("K", "WORDS"))
        assert VECTOR in "".join(_check(compiled, tmp_path))
        assert all(VECTOR in store for store in re.findall(r"st\.global\S*", compiled.asm["ptx"]))
    types = {"x_ptr": "*fp32", "w_ptr": "*bf16", "bias_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32", "M": "i32"}
    constants = {"K": 4096, "BN": 4, "BK": 1024, "HAS_BIAS": True}
    loads = _check(_compile(dense.gemv, capability, 4, types, constants), tmp_path)
    assert all(VECTOR in load for load in loads if "evict_first" in load)


def _project(
    capability: int,
    kind: str,
    n: int,
    k: int,
    bits: int,
    chosen: Tile,
    *,
    pdl: bool,
    lines: int = 0,
    onward: bool = False,
) -> Any:
    """A projection of K = k whose N = n outputs go on as planes for INT4, or nowhere."""
    pointers = [
        "w",
        "s",
        "q",
        "xs",
        "squares",
        "bias",
        "y",
        "norm",
        "q_out",
        "s_out",
        "squares_out",
        "arrivals",
        "next",
    ]
    types = {f"{name}_ptr": "*i32" if name in ("w", "q", "q_out", "arrivals", "next") else "*fp32" for name in pointers}
    types |= {"s_ptr": "*bf16", "N": "i32", "NEXT_ROWS": "i32"}
    constants = {
        "K": k,
        "G": k if bits == 8 else 128,
        "BITS": bits,
        "XC": plane_columns(k, bits),
        "BN": chosen.rows,
        "BW": chosen.columns,
        "HAS_BIAS": False,
        "NORMED": kind != "add",
        "EPS": 1e-5,
        "KIND": kind,
        "ACTIVATION": "silu",
        "C_OUT": 0 if kind == "store" else 8,
        "XC_OUT": plane_columns(n, 4),
        "FOLD_OUT": 0.0625,
        "PDL": pdl,
        "ONWARD": onward,
        "AHEAD": pdl,
        **({"ROUNDS": chosen.rounds} if chosen.rounds > 1 else {"EARLY": 1}),
        "NEXT_PITCH": k * bits // 32,
        "NEXT_LINES": 4,
        "NEXT_SHARE": 32 * lines,
        "EMULATE": False,
    }
    kernel = project.stream if chosen.rounds > 1 else project.project
    return _compile(kernel, capability, chosen.warps, types, constants)


def _attend(capability: int, group: int, dim: int, *, bits: int = 16, pdl: bool = False) -> Any:
    kernel = attention.attend if bits == 16 else packed.attend_packed
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {"position_ptr": "*i64", "kv_ptr": {16: "*fp16", 8: "*i8", 4: "*u8"}[bits]}
    types |= {"arrivals_ptr": "*i32", "q_out_ptr": "*i32", "SLOTS": "i32"}
    types |= {"signs_ptr": "*fp16"} if bits < 16 else {}
    heads = Heads(8, group, dim, dim, dim**-0.5)
    kind = {16: torch.float16, 8: torch.int8, 4: torch.uint8}[bits]
    split = replace(split_for(heads, SM_COUNTS[capability], kind), splits=16)
    given = {
        "KV_HEADS": 8,
        "G": group,
        "D": dim,
        "DIMS": dim,
        "SCALE": dim**-0.5,
        "WINDOW": 0,
        "Q_EPS": 1e-6,
        "K_EPS": 1e-6,
        "SPLITS": split.splits,
        "LEAST": split.least,
        "BLOCK": split.block,
        "STAGES": split.stages,
        "AHEAD": split.least,
        "BITS": bits,
        "SIZE": turn.block(dim),
        "TOGETHER": _together(heads, split, bits),
        "C_OUT": 8,
        "XC_OUT": plane_columns(8 * group * dim, 4),
        "FOLD_OUT": 0.0625,
        "SIZE_OUT": 32,
        "PDL": pdl,
        "EMULATE": False,
    }
    constants = {name: given[name] for name in kernel.arg_names if name in given}
    return _compile(kernel, capability, split.warps, types, constants)


def _attend_short(capability: int, group: int, dim: int, block: int, warps: int, *, pdl: bool = False) -> Any:
    pointers = ["qkv", "q_norm", "k_norm", "cos", "sin", "position", "kv", "part", "peak", "sum", "arrivals"]
    types = {f"{name}_ptr": "*fp32" for name in [*pointers, "q_out", "s_out"]}
    types |= {"position_ptr": "*i64", "kv_ptr": "*fp16", "arrivals_ptr": "*i32", "q_out_ptr": "*i32", "SLOTS": "i32"}
    constants = {"KV_HEADS": 8, "G": group, "D": dim, "DIMS": dim, "SCALE": dim**-0.5, "WINDOW": 0}
    constants |= {"Q_EPS": 1e-6, "K_EPS": 1e-6, "PARTS": 8, "BLOCK": block, "WARPS": warps, "C_OUT": 8}
    constants |= {"XC_OUT": plane_columns(8 * group * dim, 4), "FOLD_OUT": 0.0625, "SIZE_OUT": 32}
    constants |= {"PDL": pdl, "ONWARD": False}
    return _compile(short.attend_short, capability, warps, types, constants)


def _batch(capability: int, kind: str, bits: int, group: int, fours: int, chosen: BatchTile, *, pdl: bool) -> Any:
    """A projection of several texts, K = 4096, whose outputs go on as planes for INT4, or nowhere."""
    pointers = ["w", "s", "q", "xs", "squares", "bias", "y", "norm", "q_out", "s_out", "squares_out", "arrivals"]
    types = {f"{name}_ptr": "*fp32" for name in pointers}
    types |= {"w_ptr": "*i32", "s_ptr": "*bf16", "q_ptr": "*i32", "q_out_ptr": "*i32", "arrivals_ptr": "*i32"}
    constants = {
        "K": 4096,
        "G": group,
        "BITS": bits,
        "XC": plane_columns(4096, bits),
        "FOURS": fours,
        "S": chosen.split,
        "T": chosen.blocks,
        "R": chosen.rows,
        "DEPTH": chosen.depth,
        "HAS_BIAS": True,
        "NORMED": kind != "add",
        "EPS": 1e-5,
        "KIND": kind,
        "ACTIVATION": "silu",
        "C_OUT": 0 if kind == "store" else 8,
        "XC_OUT": plane_columns(4096, 4),
        "FOLD_OUT": 0.0625,
        "SIZE_OUT": 128,
        "PDL": pdl,
        "ONWARD": True,
        "EMULATE": False,
    }
    return _compile(batch.batch, capability, chosen.warps, {**types, "N": "i32", "M": "i32"}, constants)


SHARED, WHOLE = Tile(2, 128, 1), Tile(32, 128, 8)  # several programs a block of 32 outputs, or whole blocks a program
SOME = [86, 90]  # for kernels that differ little from those compiled for all


@pytest.mark.parametrize("capability", SM_COUNTS)
def test_projections_of_a_fused_step(capability: int, tmp_path: Path) -> None:
    few = capability not in SOME
    for kind, bits, chosen in [
        ("add", 4, SHARED),
        ("gated", 3, Tile(4, 128, 1)),
        ("store", 8, SHARED),
        ("add", 4, WHOLE),
        ("store", 3, Tile(2, 128, 1, 2)),  # rounds of whole rows
        ("gated", 8, Tile(4, 1024, 4, 4)),
    ][: 1 if few else None]:
        loads = _check(_project(capability, kind, 4096, 4096, bits, chosen, pdl=False), tmp_path, 16384)
        weights = [load for load in loads if "evict_first" in load]
        assert weights
        assert all(VECTOR in load for load in weights), loads


@pytest.mark.parametrize("capability", SM_COUNTS)
def test_attention_of_a_fused_step(capability: int, tmp_path: Path) -> None:
    shapes = [(4, 128, 16), (7, 64, 16), (1, 96, 16), (2, 128, 8), (4, 128, 4), (3, 256, 16), (3, 256, 8)]
    for group, dim, bits in shapes if capability in SOME else shapes[:1]:
        compiled = _attend(capability, group, dim, bits=bits)
        assert shared_memory(Heads(8, group, dim, dim, 1.0), bits) == LEAST_SHARED
        _check(compiled, tmp_path, stack=8)  # what every lane needs once, at the end
        assert "mma.sync" in compiled.asm["ptx"]
        cached = re.findall(
            r"cp\.async\.\w+\.shared\.global \[ \S+ \+ \d+ \], \[ \S+ \+ \d+ \], (0x\w+|\d+)", compiled.asm["ptx"]
        )
        assert cached
        sizes = {int(size, 0) for size in cached}
        assert sizes == ({4, 16} if bits < 16 else {16})  # scales one by one
        if bits < 16:
            assert "mma.sync.aligned.m16n8k32" in compiled.asm["ptx"]
            loop = compiled.asm["ptx"].split("cp.async.wait_group")[1]
            assert "sub.f16x2" in loop
            assert not re.search(r"cvt\.rn\.f16\.s|cvt\.rn\.f32\.s(8|16)|ld\.shared\.[bus]8", loop)
        assert "atom.global.gpu.acq_rel" in compiled.asm["ptx"]


@pytest.mark.parametrize("dim", [160, 256])
def test_what_is_refused_does_not_fit(dim: int) -> None:
    needed = _attend(86, 3, dim, bits=4).metadata.shared
    assert LEAST_SHARED < needed <= shared_memory(Heads(8, 3, dim, dim, 1.0), 4)


@pytest.mark.parametrize("capability", SM_COUNTS)
def test_attention_to_a_short_text(capability: int, tmp_path: Path) -> None:
    shapes = [(4, 128, 64, 8), (2, 128, 128, 8), (7, 64, 64, 4), (1, 96, 64, 8)]
    for group, dim, block, warps in shapes if capability in SOME else shapes[:1]:
        compiled = _attend_short(capability, group, dim, block, warps)
        loads = _check(compiled, tmp_path, shared_limit=8192, stack=8)
        assert sum(VECTOR in load for load in loads) >= 2 * block * dim // (256 * warps)  # keys and values
        assert compiled.asm["ptx"].count("bar.sync") <= 16  # warps meet at the end, and for the merge


@pytest.mark.parametrize("capability", SOME)
@pytest.mark.parametrize("dim", [128, 256])
def test_the_rules_attention_to_short_texts(dim: int, capability: int, tmp_path: Path) -> None:
    for texts in (2, 4):
        how = Plan().shortening(Heads(8, 4, dim, dim, 1.0), texts)
        assert how is not None
        _check(_attend_short(capability, 4, dim, how.block, how.warps, pdl=capability == 90), tmp_path, stack=48)


def test_dependent_launch_waits_after_the_first_weights_and_before_the_activations() -> None:
    ptx = _project(90, "add", 4096, 4096, 4, SHARED, pdl=True).asm["ptx"]
    wait = ptx.index("griddepcontrol.wait")
    loads = [(match.start(), "evict_first" in match.group()) for match in re.finditer(r"ld\.global\S*", ptx)]
    assert ptx.index("griddepcontrol.launch_dependents") > wait
    assert ptx.index("prefetch.global.L2") < wait
    assert sum(weight for at, weight in loads if at < wait) == 2  # a row's words of the first step
    assert sum(not weight for at, weight in loads if at < wait) <= 5  # its scales, and the norm's weights
    ptx = _project(90, "store", 4096, 4096, 3, Tile(2, 128, 1, 4), pdl=True, lines=2).asm["ptx"]
    before, after = ptx.split("griddepcontrol.wait")
    assert before.count("evict_first") >= 6  # three words of the first two rows
    assert 0 < before.count("prefetch.global.L2") <= 8  # its own rows, and lines of the next projection
    assert "prefetch.global.L2" not in after
    at_once = _project(90, "add", 4096, 4096, 4, SHARED, pdl=True, onward=True).asm["ptx"]
    assert at_once.index("griddepcontrol.launch_dependents") < at_once.index("ld.global")
    ptx = _attend(90, 4, 128, pdl=True).asm["ptx"]
    before, after = ptx.split("griddepcontrol.wait")
    assert 1 < len(re.findall(r"ld\.global", before)) <= 12  # the position, angles and norms
    assert "cp.async" not in before
    assert len(re.findall(r"ld\.global", after)) >= 5
    before, after = _attend_short(90, 4, 128, 128, 8, pdl=True).asm["ptx"].split("griddepcontrol.wait")
    assert len(re.findall(r"ld\.global\S*v4", before)) >= 16  # keys and values
    assert "st.global" not in before


@pytest.mark.parametrize("capability", SOME)
def test_the_small_kernels_of_a_fused_step(capability: int, tmp_path: Path) -> None:
    stream = {"x_ptr": "*fp32", "norm_ptr": "*fp32", "q_ptr": "*i32", "s_ptr": "*fp32", "squares_ptr": "*fp32"}
    size = {"N": "i32", "XC": "i32"}
    layout = {"C": 8, "FOLD": 0.0625, "BB": 8, "SIZE": 32, "PDL": False}
    last = {**layout, "ONWARD": False}
    _check(_compile(planes.norm, capability, 4, {**stream, **size}, last), tmp_path)
    _check(
        _compile(planes.embed, capability, 4, {"token_ptr": "*i64", "table_ptr": "*bf16", **stream, **size}, layout),
        tmp_path,
    )
    plain = {name: kind for name, kind in stream.items() if name not in ("norm_ptr", "squares_ptr")}
    _check(_compile(planes.plain, capability, 4, {**plain, **size}, last), tmp_path)
    dense_types = {f"{name}_ptr": "*fp32" for name in ("x", "norm", "squares", "w", "bias", "y")}
    constants = {"K": 2048, "BN": 4, "BK": 1024, "HAS_BIAS": False, "EPS": 1e-6, "SIZE": 32, "PDL": False}
    dense_types |= {"w_ptr": "*bf16", "N": "i32", "M": "i32"}
    loads = _check(_compile(project.project_dense, capability, 4, dense_types, constants), tmp_path, 16384)
    assert all(VECTOR in load for load in loads if "evict_first" in load)


@pytest.mark.parametrize("capability", SOME)
def test_sampling(capability: int, tmp_path: Path) -> None:
    kinds = {"seen_ptr": "*i8", "seed_ptr": "*i32", "index_ptr": "*i32", "arrivals_ptr": "*i32", "top_k_ptr": "*i32"}
    kinds |= dict.fromkeys(("token_ptr", "position_ptr", "history_ptr"), "*i64") | dict.fromkeys(
        ("V", "SLOTS", "PROGRAMS"), "i32"
    )
    options = {"BLOCK": 1024, "PP": 128, "PENALTY": True, "PDL": False, "PART": 128, "WAYS": 64}
    for kernel, chosen in (
        (sample.begin, {"GREEDY": True}),
        (sample.begin, {"GREEDY": False}),
        (sample.narrow, {"MASS": True, "FIRST": True}),
        (sample.draw, {"FILTERED": True}),
    ):
        constants = {name: value for name, value in {**options, **chosen}.items() if name in kernel.arg_names}
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        types = {name: kinds.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
        compiled = _compile(kernel, capability, 8 if kernel is sample.narrow else 4, types, constants)
        _check(compiled, tmp_path)
        assert "lg2.approx" not in compiled.asm["ptx"]  # noise is made of logarithms close to 1


@pytest.mark.parametrize("capability", SM_COUNTS)
def test_batches(capability: int, tmp_path: Path) -> None:
    cases = [
        (4, 256, 2, BatchTile(2), "add"),
        (4, 256, 4, BatchTile(8), "store"),
        (8, 4096, 2, BatchTile(4), "gated"),
        (4, 64, 1, BatchTile(2, 4, 2), "gated"),
    ]
    for bits, group, fours, chosen, kind in cases[: None if capability in SOME else 1]:
        warps = chosen.warps
        compiled = _batch(capability, kind, bits, group, fours, chosen, pdl=False)
        loads = _check(compiled, tmp_path)
        weights = [load for load in loads if "evict_first" in load]
        assert weights
        assert all(VECTOR in load for load in weights), loads
        assert "mma.sync.aligned.m16n8k32" in compiled.asm["ptx"]
        # What makes a load's registers the operands of the instruction: four threads a row, eight rows a warp.
        layout = re.search(rf"tt\.load .*tensor<16x{8 * warps}x!tt\.ptr<i32>, (#\w+)>", compiled.asm["ttgir"])
        assert layout is not None
        wanted = f"sizePerThread = [4, 1], threadsPerWarp = [4, 8], warpsPerCTA = [1, {warps}], order = [0, 1]"
        assert f"{layout.group(1)} = #ttg.blocked<{{{wanted}}}>" in compiled.asm["ttgir"]
        for result in re.findall(r"elementwise_inline_asm .*-> (.*)", compiled.asm["ttgir"]):
            assert set(re.findall(r"(#\w+)>", result)) == {layout.group(1)}


@pytest.mark.parametrize("capability", SOME)
def test_the_rules_tiles_of_batches(capability: int, tmp_path: Path) -> None:
    for n, bits, group, tokens in [(4096, 4, 256, 4), (28672, 4, 256, 8), (4096, 4, 256, 16), (4096, 4, 32, 16)]:
        weight = ArrangedWeight(torch.empty((n, 0)), torch.empty((n, 0)), bits, group, 4096)
        kind, chosen = "add" if n == 4096 else "gated", tile_for(weight, tokens, SM_COUNTS[capability])
        _check(_batch(capability, kind, bits, group, triton.cdiv(tokens, 4), chosen, pdl=False), tmp_path)


def test_batches_wait_after_the_first_weights_and_before_the_activations() -> None:
    ptx = _batch(90, "add", 4, 256, 2, BatchTile(8, 1, 2, 2), pdl=True).asm["ptx"]
    before, after = ptx.split("griddepcontrol.wait")
    assert before.index("griddepcontrol.launch_dependents") < before.index("ld.global")
    weights = re.findall(r"ld\.global\S*evict_first", before)
    assert len(weights) == 2 * 2 * 2  # both halves of a block's rows: of two blocks, for two steps
    scales_of_tokens = r"ld\.global\.b32 %"  # by assembly, which compilers may move as far as its operands let them
    assert not re.search(scales_of_tokens, before)
    assert re.search(scales_of_tokens, after)
    assert "st.global" not in before


@pytest.mark.parametrize("capability", SOME)
def test_attention_of_prompts(capability: int, tmp_path: Path) -> None:
    for dim, m, window in [(128, 2048, 0), (64, 512, 9), (128, 1, 0)]:
        tile = attention_tile(dim, m, capability == 90)
        types = {"q_ptr": "*fp16", "kv_ptr": "*fp16", "out_ptr": "*fp16"}
        types |= dict.fromkeys(("M", "START", "SLOTS"), "i32")
        constants = {"KV_HEADS": 8, "G": 4, "D": dim, "SCALE": dim**-0.5, "WINDOW": window}
        constants |= {"BM": tile.tokens, "BN": tile.block, "STAGES": tile.stages}
        compiled = _compile(prompt.attend, capability, tile.warps, types, constants)
        _check(compiled, tmp_path, 160 * 1024 if capability == 90 else LEAST_SHARED)
        assert "cp.async" in compiled.asm["ptx"]
        assert ("wgmma" if capability == 90 and m > 16 else "mma.sync") in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", SOME)
def test_rows_of_prompts(capability: int, tmp_path: Path) -> None:
    """What each token goes through between products: 16 bytes at a time, nothing spilled at the largest width."""
    types = {"out_ptr": "*fp16", "y_ptr": "*fp16", "K": "i32"}
    flags = {"ADD": True, "SCALED": True, "HAS_BIAS": False, "NORM": True, "EPS": 1e-5, "PEAK": 1.0}
    for kernel, width in ((prompt.add_norm, 8192), (prompt.operand, 32768), (prompt.gate, 32768)):
        names = [name for name in kernel.arg_names if name.endswith("_ptr") or name == "K"]
        chosen = {**flags, "ACTIVATION": "silu", "BK": width}
        constants = {name: chosen[name] for name in kernel.arg_names if name not in names}
        kinds = {name: types.get(name, "*fp32") for name in names}
        compiled = _compile(kernel, capability, min(16, width // 1024), kinds, constants, sizes=("K",))
        loads = [load for load in _check(compiled, tmp_path) if VECTOR not in load]
        assert len(loads) <= 1, loads  # the unit
    heads = [name for name in prompt.heads.arg_names if name.endswith("_ptr")]
    kinds = {name: "*fp16" if name in ("y_ptr", "q_ptr", "kv_ptr") else "*fp32" for name in heads}
    kinds |= dict.fromkeys(("M", "START", "SLOTS"), "i32")
    constants = {"H": 32, "KV_HEADS": 8, "D": 128, "DIMS": 128, "Q_EPS": 1e-6, "K_EPS": 1e-6, "SCALED": True}
    constants |= {"HAS_BIAS": True, "BM": 16}
    _check(_compile(prompt.heads, capability, 4, kinds, constants), tmp_path)


@pytest.mark.parametrize("capability", SOME)
@pytest.mark.parametrize(("bits", "dim"), [(8, 128), (4, 128), (8, 256)])
def test_caches_of_prompts_in_few_bits(bits: int, dim: int, capability: int, tmp_path: Path) -> None:
    kinds = {"kv_ptr": {8: "*i8", 4: "*u8"}[bits], "signs_ptr": "*fp16", "x_ptr": "*fp16", "out_ptr": "*fp16"}
    kinds |= dict.fromkeys(("STOP", "SLOTS", "START", "M"), "i32")
    given = {"KV_HEADS": 8, "D": dim, "BITS": bits, "SIZE": turn.block(dim), "BM": 16, "BS": 32}
    for kernel in (prompt.close, prompt.open_all):
        types = {name: kinds.get(name, "*fp32") for name in kernel.arg_names if name not in given}
        constants = {name: given[name] for name in kernel.arg_names if name in given}
        assert VECTOR in "".join(_check(_compile(kernel, capability, 4, types, constants), tmp_path, stack=8))


def _launched(gpu: Gpu, model: str, bits: int, context: int = 8192) -> list[Kernel]:
    """All that decoding a model greedily and taking prompts in launch there."""
    spec = MODELS[model].spec()
    quantized = RandomWeights(spec, bits, None if bits == 8 else 256, torch.device("cpu")).quantized
    return kernels_of(Job(spec, quantized, gpu, "auto", context, PROMPTS, (SamplingOptions(),)))


def _check_all(gpu: Gpu, kernels: list[Kernel], tmp_path: Path) -> None:
    """Next to nothing is spilled, weights are read by 16 bytes, and a multiprocessor has room for a program."""
    assert kernels
    for kernel in dict.fromkeys(kernels):
        with standing_in(gpu):
            compiled = kernel.compile()
        large = gpu.capability[0] in (9, 10)
        # For sm_100 a product of int8 has a frame of 16 bytes, into which nothing is written.
        loads = _check(compiled, tmp_path, 226 * 1024 if large else LEAST_SHARED, 16 if gpu.capability[0] == 10 else 8)
        weights = [load for load in loads if "evict_first" in load]
        assert all(VECTOR in load for load in weights), f"{kernel.function.__name__}: {loads}"


# One of each: A100, RTX 3060, 4060, H200, B200, 5050. Tiles are those of the table, or of the rule where it is silent.
GPUS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("capability", GPUS)
def test_all_that_a_model_launches(capability: tuple[int, int], tmp_path: Path) -> None:
    sms = {**SM_COUNTS, 100: 148}[10 * capability[0] + capability[1]]
    gpu = Gpu("pretended", capability, sms)
    kernels = _launched(gpu, "llama-3.1-8b", 4)
    assert len(kernels) >= 30
    names = {kernel.function.__name__ for kernel in kernels}
    assert names >= {"project", "attend", "attend_short", "batch", "begin", "dequantize", "heads", "gate"}
    _check_all(gpu, kernels, tmp_path)
    if 10 * capability[0] + capability[1] in SOME:  # with keys and values in int8
        _check_all(gpu, _launched(gpu, "llama-3.1-8b", 4, context=131072), tmp_path)


@pytest.mark.parametrize(
    ("model", "bits"), [("qwen3-0.6b", 4), ("qwen3-1.7b", 4), ("llama-3.1-8b", 8), ("llama-3.1-8b", 3)]
)
@pytest.mark.parametrize("table", shipped(), ids=lambda table: table.gpu)
def test_shipped_tiles(table: Table, model: str, bits: int, tmp_path: Path) -> None:
    gpu = Gpu(table.gpu, table.capability, table.multiprocessors)
    kernels = [
        kernel
        for kernel in _launched(gpu, model, bits)
        if kernel.function.__name__ in ("project", "stream", "attend_short")
    ]
    _check_all(gpu, kernels, tmp_path)
