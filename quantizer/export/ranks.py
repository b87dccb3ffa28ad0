"""Layers split between the ranks of tensor parallelism, as vLLM and SGLang split them.

Attention's and the MLP's first matrices are split by outputs, whole heads to a rank; where there are fewer key heads
than ranks, several get the same one. ``o_proj`` and ``down_proj`` are split by inputs: a rank's must be whole groups
and whole words; of one scale a row every rank has a copy. Read in ``vllm.model_executor.layers.linear`` and
``compressed_tensors_wNa16.py``; ``tests/servers`` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lbq.formats.errors import UsageError
from lbq.formats.manifest import QuantizedModule
from lbq.formats.packing import GROUPS
from lbq.formats.spec import ModelSpec, Projection

BY_INPUTS = ("o_proj", "down_proj")
WORD = 32  # bits


def check_ranks(spec: ModelSpec, ranks: int, where: str) -> None:
    """Raise UsageError for a number of ranks that heads or widths do not divide into."""
    if ranks < 1:
        raise UsageError(f"--tensor-parallel {ranks}: 1 or more")
    for kind in spec.layer_kinds:
        mixer, width = kind.mixer, kind.mlp.down.in_features
        if mixer.heads % ranks:
            raise UsageError(f"{where}: {mixer.heads} heads do not divide between {ranks} ranks")
        if mixer.kv_heads % ranks and ranks % mixer.kv_heads:
            raise UsageError(f"{where}: {mixer.kv_heads} key heads and {ranks} ranks do not divide one another")
        if width % ranks:
            raise UsageError(f"{where}: {width} inputs of down_proj do not divide between {ranks} ranks")


def for_ranks(name: str, entry: QuantizedModule, ranks: int, where: str) -> QuantizedModule:
    """The layer in groups of which every rank has whole ones: its own, or smaller ones. Raises UsageError where there
    are none."""
    if ranks == 1 or not name.endswith(BY_INPUTS):
        return entry
    share = entry.k // ranks
    if share * entry.bits % WORD:
        raise UsageError(f"{where}: {name}: {share} inputs of a rank are no whole words of INT{entry.bits} codes")
    if entry.scheme.group is None:
        return entry
    fitting = [g for g in GROUPS if entry.group % g == 0 and share % g == 0]
    if not fitting:
        raise UsageError(
            f"{where}: {name}: {share} inputs of each of {ranks} ranks do not divide into groups of {min(GROUPS)}; "
            "convert it with --gs row, or choose fewer ranks"
        )
    return msgspec.structs.replace(entry, group=max(fitting))


def share(unit: Sequence[Projection], spec: ModelSpec, ranks: int) -> tuple[int, int]:
    """(N, K) of a rank's part of a fused unit."""
    n, k = sum(p.out_features for p in unit), unit[0].in_features
    name = unit[0].name
    if name.endswith(BY_INPUTS):
        return n, k // ranks
    least = spec.layer_kinds[0].mixer.head_dim if name.endswith("q_proj") else 0  # a rank has a key head at least
    return sum(max(-(-p.out_features // ranks), least) for p in unit), k
