"""What vLLM's and SGLang's kernels make of an artifact's layers on an NVIDIA GPU, as their sources say.

Read, not run: see ``docs/format.md``, whose matrix is this module's (a test compares them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from lbq.formats.packing import GROUPS
from lbq.formats.scheme import Scheme

VERSIONS: Final = {"vLLM": "0.33.0", "SGLang": "0.5.23"}


@dataclass(frozen=True)
class Cell:
    """Rows of the matrix: widths, groups (None: one scale a row), and what each tool does with them."""

    bits: tuple[int, ...]
    groups: tuple[int | None, ...]
    vllm: str
    sglang: str


FAST_GROUP: Final = 128  # the largest that their fast kernels take
FAILS: Final = "loads, fails at the first product"
MATRIX: Final = (
    Cell((8, 4), (None,), "Machete, Marlin", "Marlin"),
    Cell((8, 4), (64, 128), "Machete, Marlin", "Marlin"),
    Cell((8, 4), (32,), "Marlin", "Marlin"),
    Cell((4,), (256,), "Triton (written for ROCm; not tuned for NVIDIA)", FAILS),
    Cell((4,), (512,), "Humming", FAILS),
    Cell((8,), (256, 512), "Humming", FAILS),
    Cell((3,), (*GROUPS, None), "Humming; reads the dense layout; K a multiple of 32", "refuses at start"),
)


@dataclass(frozen=True)
class Fit:
    """What a tool does with a layer: whether it runs, by a kernel that is fast, and which."""

    runs: bool
    fast: bool
    text: str


def fast_group(group: int | None) -> int | None:
    """The group to store codes of ``group`` in for both tools' fast kernels, scales repeated; None: one scale a row."""
    return None if group is None else min(group, FAST_GROUP)


def cell(bits: int, group: int | None) -> Cell:
    """The matrix's entry for codes of ``bits`` in groups, None standing for a row."""
    return next(c for c in MATRIX if bits in c.bits and group in c.groups)


def vllm_fit(n: int, k: int, scheme: Scheme) -> Fit:
    """What vLLM does with a layer [n, k]; of a fused one, n is the sum."""
    whole = {3: 32, 4: 8, 8: 4}[scheme.bits]
    if k % whole:
        return Fit(runs=False, fast=False, text=f"no kernel: inputs are not a multiple of {whole}")
    kernel = cell(scheme.bits, scheme.group).vllm
    if kernel.startswith("Machete") and (k % 64 or n % 128):
        kernel = "Marlin"
    if kernel.startswith("Triton") and n % 8:
        kernel = "Humming"
    fast = kernel.startswith(("Machete", "Marlin"))
    if fast and not _marlin_has(n, k):
        return Fit(runs=True, fast=False, text="Marlin, padded")
    return Fit(runs=True, fast=fast, text=re.split(r";| \(", kernel)[0])


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
