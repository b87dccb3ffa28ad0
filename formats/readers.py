"""What vLLM's and SGLang's kernels make of an artifact's layers on an NVIDIA GPU, as their sources say.

``docs/format.md`` has the same matrix (a test compares them). Where vLLM is installed, ``tests/servers/test_vllm.py``
asks its own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lbq.formats.packing import GROUPS
from lbq.formats.scheme import Scheme

VERSIONS: Final = {"vLLM": "0.33.0", "SGLang": "0.5.23"}


@dataclass(frozen=True)
class Cell:
    """Rows of the matrix: widths, groups (None: one scale a row), and what each tool does with them.

    ``hopper`` is vLLM at compute capability 9.0, where it prefers other kernels; of two the first needs K % 64 = 0 and
    N % 128 = 0.
    """

    bits: tuple[int, ...]
    groups: tuple[int | None, ...]
    vllm: str
    hopper: str
    sglang: str


FAST_GROUP: Final = 128  # the largest that their fast kernels take
FAILS: Final = "loads, fails at the first product"
MATRIX: Final = (
    Cell((8, 4), (None,), "Marlin", "Machete, Humming", "Marlin"),
    Cell((8, 4), (64, 128), "Marlin", "Machete, Humming", "Marlin"),
    Cell((8, 4), (32,), "Marlin", "Humming", "Marlin"),
    Cell((4,), (256,), "Triton", "Humming", FAILS),
    Cell((4,), (512,), "Humming", "Humming", FAILS),
    Cell((8,), (256, 512), "Humming", "Humming", FAILS),
    Cell((3,), (*GROUPS, None), "Humming", "Humming", "refuses at start"),
)


@dataclass(frozen=True)
class Fit:
    """What a tool does with a layer: whether it runs, by a kernel that is fast (before Hopper and after), and which."""

    runs: bool
    fast: bool
    text: str


def fast_group(group: int | None) -> int | None:
    """The group to store codes of ``group`` in for both tools' fast kernels, scales repeated; None: one scale a row."""
    return None if group is None else min(group, FAST_GROUP)


def cell(bits: int, group: int | None) -> Cell:
    """The matrix's entry for codes of ``bits`` in groups, None standing for a row."""
    return next(c for c in MATRIX if bits in c.bits and group in c.groups)


def vllm_kernel(n: int, k: int, scheme: Scheme, *, hopper: bool) -> str:
    """The kernel that vLLM takes for a layer [n, k] that it can run."""
    found = cell(scheme.bits, scheme.group)
    if not hopper:
        return "Humming" if found.vllm == "Triton" and n % 8 else found.vllm
    first, _, other = found.hopper.partition(", ")
    return other if other and (k % 64 or n % 128) else first


def vllm_fit(n: int, k: int, scheme: Scheme) -> Fit:
    """What vLLM does with a layer [n, k]; of a fused one, n is the sum."""
    whole = {3: 32, 4: 8, 8: 4}[scheme.bits]
    if k % whole:
        return Fit(runs=False, fast=False, text=f"no kernel: inputs are not a multiple of {whole}")
    kernel, newer = (vllm_kernel(n, k, scheme, hopper=hopper) for hopper in (False, True))
    padded = kernel == "Marlin" and not _marlin_has(n, k)
    text = f"{kernel}, padded" if padded else kernel
    text += "" if newer == kernel else f" (Hopper: {newer})"
    return Fit(runs=True, fast=kernel == "Marlin" and not padded, text=text)


def sglang_fit(n: int, k: int, scheme: Scheme) -> Fit:
    """What SGLang does with a layer [n, k]; of a fused one, n is the sum."""
    found = cell(scheme.bits, scheme.group).sglang
    if found != "Marlin":
        return Fit(runs=False, fast=False, text=f"no kernel: {found}")
    if not _marlin_has(n, k):
        return Fit(runs=False, fast=False, text=f"no kernel for the shape: {FAILS}")
    return Fit(runs=True, fast=True, text=found)


def _marlin_has(n: int, k: int) -> bool:
    return (k % 128 == 0 and n % 64 == 0) or (k % 64 == 0 and n % 128 == 0)
