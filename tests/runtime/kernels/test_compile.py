"""Every kernel compiles for the GPUs that matter, without one: no spills, little shared memory, 16-byte loads."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lbq.runtime.kernels.dense import triton as dense
from lbq.runtime.kernels.dequant import triton as dequant
from lbq.runtime.kernels.gemv import plane_columns, tile
from lbq.runtime.kernels.gemv import triton as gemv
from lbq.runtime.kernels.gemv.tiles import codes_a_column

pytestmark = pytest.mark.skipif(gemv.INTERPRETED, reason="the interpreter compiles nothing")

# Multiprocessors of one GPU of each capability: the tile rule follows them. A100, RTX 3060, 4060, H200, 5050.
SM_COUNTS = {80: 108, 86: 28, 89: 24, 90: 132, 120: 20}
SHARED_LIMIT = 99 * 1024  # of one program on sm_86, 89 and 120
# N, K of the projections of an 8B, a 0.6B and a 135M model
SHAPES = [(28672, 4096), (4096, 14336), (12288, 2048), (6144, 1024), (576, 576)]
VECTOR = ".v4.b32"


def _compile(kernel: Any, capability: int, warps: int, types: dict[str, str], constants: dict[str, Any]) -> Any:
    """``kernel`` for sm_``capability``; pointers are 16-byte aligned, as torch's allocations are."""
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    assert list(signature) == kernel.arg_names
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def _check(compiled: Any, tmp_path: Path, shared_limit: int = SHARED_LIMIT) -> list[str]:
    """No spills, bounded shared memory; returns the global loads of the PTX."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage
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
        constants = {"C": codes_a_column(bits), "FOLD": 2.0 ** (bits - 8), "BB": 16}
        _check(_compile(gemv.quantize, capability, 4, types, constants), tmp_path)
    types = {"src_ptr": "*i32", "dst_ptr": "*i32", "COUNT": "i32", "WORDS": "i32", "COLS": "i32"}
    _check(_compile(gemv.split_planes, capability, 4, types, {"BT": 256}), tmp_path)
    types = {"w_ptr": "*i32", "s_ptr": "*bf16", "norm_ptr": "*fp32", "out_ptr": "*fp16"}
    types |= {"ROWS": "i32", "K": "i32", "G": "i32"}
    for bits in (3, 4, 8):
        constants = {"BITS": bits, "RELATIVE": True, "BN": 4, "BK": 512}
        _check(_compile(dequant.dequantize, capability, 4, types, constants), tmp_path)
    types = {"x_ptr": "*fp32", "w_ptr": "*bf16", "bias_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32", "M": "i32"}
    constants = {"K": 4096, "BN": 4, "BK": 1024, "HAS_BIAS": True}
    loads = _check(_compile(dense.gemv, capability, 4, types, constants), tmp_path)
    assert all(VECTOR in load for load in loads if "evict_first" in load)
