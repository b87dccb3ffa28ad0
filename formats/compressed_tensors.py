"""The ``quantization_config`` of config.json, as readers of compressed-tensors checkpoints need it.

``docs/format.md`` ("How readers match") has the rules and where each was read. In short: one config group a scheme;
every target is exact (an anchored regex over the names of that scheme, or the plain name of a module outside the
layers, ``lm_head``), no two targets meet and none is a class; every 16-bit linear is in ``ignore``; and wherever
vLLM and SGLang fuse projections, the fused name stands beside its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lbq.formats.scheme import Scheme

FORMAT = "pack-quantized"

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Projection → the name of the module that vLLM and SGLang fuse it into."""


def quantization_config(schemes: Mapping[str, Scheme], dense_linears: Iterable[str] = ()) -> dict[str, object]:
    """The value of ``quantization_config`` for a checkpoint of these modules.

    ``schemes``: module name (``model.layers.0.self_attn.q_proj``, ``lm_head``) → scheme of its weight.
    ``dense_linears``: names of every linear module that stays in 16 bits; embeddings and norms do not belong here.
    The parts of a fused unit (q/k/v, gate/up) must share one scheme, or all be dense: readers can load nothing else.
    The order of the arguments decides the order in the output; the same input gives the same bytes.
    """
    wanted: dict[str, Scheme | None] = {**schemes, **dict.fromkeys(dense_linears)}
    assert schemes, "nothing is quantised"
    assert all(wanted[name] == scheme for name, scheme in schemes.items()), "a module is both quantised and dense"
    names_of: dict[Scheme | None, list[str]] = {}
    for name, scheme in _with_fused_names(wanted).items():
        names_of.setdefault(scheme, []).append(name)
    ignore = names_of.pop(None, [])
    groups = (_config_group(scheme, names) for scheme, names in names_of.items() if scheme is not None)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignore,
    }


def _config_group(scheme: Scheme, names: list[str]) -> dict[str, object]:
    return {
        "targets": _targets(names),
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if scheme.group is None else "group",
            "group_size": scheme.group,
            "dynamic": False,
        },
        "format": FORMAT,
    }


def _with_fused_names(wanted: Mapping[str, Scheme | None]) -> dict[str, Scheme | None]:
    """``wanted``, and after the first part of each fused unit the fused name with the scheme of its parts."""
    out: dict[str, Scheme | None] = {}
    for name, scheme in wanted.items():
        out[name] = scheme
        parent, dot, leaf = name.rpartition(".")
        if leaf not in FUSED:
            continue
        fused = parent + dot + FUSED[leaf]
        assert fused not in wanted, f"{fused} and its part {leaf} both exist"
        agreed = out.setdefault(fused, scheme)
        assert agreed == scheme, f"the parts of {fused} have different schemes"
    return out


def _targets(names: list[str]) -> list[str]:
    """Targets that match exactly ``names``: one regex for each first component, plain names where there is no dot."""
    by_root: dict[str, list[str]] = {}
    for name in names:
        by_root.setdefault(name.partition(".")[0], []).append(name)
    return [
        root if members == [root] else f"re:^{_alternatives([tuple(name.split('.')) for name in members])}$"
        for root, members in by_root.items()
    ]


def _alternatives(paths: list[tuple[str, ...]]) -> str:
    """A regex for exactly these dotted paths (none empty), where components with the same continuations share them."""
    tails_of: dict[str, list[tuple[str, ...]]] = {}
    for head, *tail in paths:
        tails_of.setdefault(head, []).append(tuple(tail))
    heads_of: dict[frozenset[tuple[str, ...]], list[str]] = {}
    for head, tails in tails_of.items():
        heads_of.setdefault(frozenset(tails), []).append(head)
    branches = []
    for heads in heads_of.values():
        tails = tails_of[heads[0]]
        longer = [tail for tail in tails if tail]
        rest = rf"\.{_alternatives(longer)}" if longer else ""
        if rest and len(longer) < len(tails):  # a path that is also the start of another
            rest = f"(?:{rest})?"
        branches.append(_either([re.escape(head) for head in heads]) + rest)
    return _either(branches)


def _either(branches: list[str]) -> str:
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
