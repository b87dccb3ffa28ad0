"""The config that lbq writes, read back with compressed-tensors' own parser and matching functions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import given, settings
from hypothesis import strategies as st

from lbq.formats.compressed_tensors import FUSED, quantization_config
from lbq.formats.packing import BITS, GROUPS
from lbq.formats.scheme import Scheme

UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LINEAR = torch.nn.Linear(1, 1, device="meta")  # targets are matched against the name and the class of a module


def scheme_of(config: QuantizationConfig, name: str) -> Scheme | None:
    """The one scheme that compressed-tensors gives the linear ``name``; None: it stays dense."""
    if is_match(name, LINEAR, config.ignore or []):
        return None
    groups = [g for g in config.config_groups.values() if match_targets(name, LINEAR, g.targets)]
    assert len(groups) <= 1, f"{name} is in several groups"
    if not groups:
        return None
    weights = groups[0].weights
    assert (weights.strategy == "channel") == (weights.group_size is None)
    assert (weights.type, weights.symmetric, weights.dynamic) == ("int", True, False)
    return Scheme(weights.num_bits, weights.group_size)


def parse(schemes: dict[str, Scheme], dense: Iterable[str] = ()) -> QuantizationConfig:
    written = json.loads(json.dumps(quantization_config(schemes, dense)))
    return QuantizationConfig.model_validate(written)


def model_of(choices: list[list[Scheme | None]], prefix: str) -> dict[str, Scheme | None]:
    return {
        f"{prefix}{layer}.{part}": scheme
        for layer, units in enumerate(choices)
        for unit, scheme in zip(UNITS, units, strict=True)
        for part in unit
    }


schemes = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((*GROUPS, None)))
layers = st.lists(st.lists(st.none() | schemes, min_size=4, max_size=4), min_size=1, max_size=13)


@settings(deadline=None, max_examples=60)
@given(choices=layers, head=st.none() | schemes, prefix=st.sampled_from(["model.layers.", "h", "a.b+c.layers."]))
def test_every_module_gets_exactly_its_scheme(
    choices: list[list[Scheme | None]], head: Scheme | None, prefix: str
) -> None:
    wanted = model_of(choices, prefix) | {"lm_head": head, "always.quantised": Scheme(8, None)}
    quantised = {name: scheme for name, scheme in wanted.items() if scheme is not None}
    config = parse(quantised, [name for name, scheme in wanted.items() if scheme is None])
    for name, scheme in wanted.items():
        assert scheme_of(config, name) == scheme
        parent, _, leaf = name.rpartition(".")
        if leaf in FUSED:
            assert scheme_of(config, f"{parent}.{FUSED[leaf]}") == scheme
        for other in (f"x{name}", f"{name}x", f"{name}.weight", name.rpartition(".")[0], f"model.{name}"):
            assert scheme_of(config, other) is None
    assert scheme_of(config, f"{prefix}{len(choices)}.mlp.down_proj") is None  # one layer more than there are
    assert config.format == "pack-quantized"
    assert config.quantization_status == "compressed"


def test_every_dense_linear_is_ignored_under_its_name_and_the_fused_one() -> None:
    config = parse({"lm_head": Scheme(8, None)}, ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate"])
    assert config.ignore == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.mlp.gate",
    ]


def test_targets_are_compact_anchored_and_name_no_class() -> None:
    choices: list[list[Scheme | None]] = [[Scheme(4, 256)] * 3 + [Scheme(8, 256)] for _ in range(80)]
    quantised = {n: s for n, s in model_of(choices, "model.layers.").items() if s} | {"lm_head": Scheme(8, None)}
    config = parse(quantised)
    targets = [target for group in config.config_groups.values() for target in group.targets]
    assert len(targets) == 3
    assert targets[-1] == "lm_head"
    assert all(re.fullmatch(r"re:\^model.*\$", target) for target in targets[:-1])
    assert max(map(len, targets)) < 500


def test_experts_fold_into_one_target() -> None:
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}": Scheme(4, 128)
        for layer in range(4)
        for expert in range(64)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    config = parse(experts, ["model.layers.0.mlp.gate"])
    (group,) = config.config_groups.values()
    assert len(group.targets) == 1
    assert len(group.targets[0]) < 400
    assert all(scheme_of(config, name) == Scheme(4, 128) for name in experts)


def test_a_path_that_is_the_start_of_another() -> None:
    wanted = {"m.a": Scheme(4, 32), "m.a.b": Scheme(4, 32), "m.c": Scheme(3, 32)}
    config = parse(wanted)
    assert {name: scheme_of(config, name) for name in wanted} == wanted
    assert scheme_of(config, "m.b") is None


def test_split_fused_units_are_refused() -> None:
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    with pytest.raises(AssertionError, match="qkv_proj"):
        quantization_config({q: Scheme(4, 256), k: Scheme(4, 128)})
    with pytest.raises(AssertionError, match="qkv_proj"):
        quantization_config({q: Scheme(4, 256)}, [k])
    with pytest.raises(AssertionError, match="both quantised and dense"):
        quantization_config({q: Scheme(4, 256)}, [q])
