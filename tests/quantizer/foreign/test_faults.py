"""Checkpoints of other tools that are broken, hostile or beyond what lbq reads: one clear error, before any weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lbq.formats.errors import DataError
from lbq.quantizer.foreign import open_foreign
from lbq.quantizer.source import resolve

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]
MODULE = "model.layers.0.mlp.down_proj"  # [64, 96]
BITS, GROUP = 4, 32


def gptq(tensors: Tensors) -> None:
    """Every layer but the head as GPTQ v1 of random codes: what is in them does not matter here."""
    random = torch.Generator().manual_seed(2)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        n, k = tensors.pop(name).shape
        module = name.removesuffix(".weight")
        words = torch.randint(-(2**31), 2**31 - 1, (k * BITS // 32, n), generator=random)
        tensors[f"{module}.qweight"] = words.int()
        tensors[f"{module}.qzeros"] = torch.full((k // GROUP, n * BITS // 32), 0x77777777, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.full((k // GROUP, n), 0.01, dtype=torch.float16)
        tensors[f"{module}.g_idx"] = (torch.arange(k) // GROUP).int()


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    base = {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "sym": True}
    config["quantization_config"] = {**base, **changes}
    path.write_text(json.dumps(config))


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    made = make_checkpoint("llama", edit=gptq)
    configure(made)
    return made


def refusal(folder: Path, read: bool = False) -> str:
    """What the error says; ``read``: a layer's values are read too."""

    def use() -> None:
        with open_foreign(resolve(folder)) as found:
            assert read, "opened"
            found.dense(f"{MODULE}.weight")

    with pytest.raises(DataError) as error:
        use()
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_the_checkpoint_is_sound(folder: Path) -> None:
    with open_foreign(resolve(folder)) as found:
        assert found.notes == ()
        assert found.dense(f"{MODULE}.weight").isfinite().all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported: compressed-tensors, GPTQ"),
        ({"quant_method": None}, "_proj.weight' is missing"),
        ({"bits": 5}, "$.bits"),
        ({"bits": "4"}, "$.bits"),
        ({"group_size": 0}, "group size 0"),
        ({"group_size": -7}, "group size -7"),
        ({"group_size": 64}, "fit none of the settings"),
        ({"bits": 8}, "fit none of the settings"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "differ"),
        ({"pack_dtype": "int8"}, "int8"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"dynamic": {"+:x": {"bits": 7}}}, "bits"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq"}, "not torch.int32 [64, 8]"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fp8"}, "auto_round:fp8"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "mx_fp"),
        ({"quant_method": "auto-round", "bits": 3, "packing_format": "auto_round:auto_awq"}, "at other than 4 bits"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
    ],
)
def test_a_config_that_says_what_lbq_does_not_read(folder: Path, changes: dict[str, object], says: str) -> None:
    configure(folder, **changes)
    assert says in refusal(folder)


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ({"weights": {"num_bits": 4, "type": "float"}}, "float"),
        ({"weights": {"num_bits": 4, "strategy": "tensor"}}, "tensor"),
        ({"weights": {"num_bits": 4, "strategy": "group"}}, "without a group_size"),
        ({"weights": {"num_bits": 4, "strategy": "group", "group_size": 0}}, "group size 0"),
        ({"weights": {"num_bits": 4, "dynamic": True}}, "dynamic"),
        ({"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}, "input_activations"),
        ({"weights": {"num_bits": 8}, "format": "int-quantized"}, "int-quantized"),
        ({"weights": {"num_bits": 4}}, "no layer has a weight_packed"),
    ],
)
def test_compressed_tensors_configs(folder: Path, scheme: dict[str, object], says: str) -> None:
    configure(folder, quant_method="compressed-tensors", config_groups={"group_0": scheme})
    assert says in refusal(folder)


def test_unknown_keys_are_noted(folder: Path) -> None:
    configure(folder, quantum=True, damp_percent=0.1)
    with open_foreign(resolve(folder)) as found:
        assert found.notes == ("quantization_config: unknown keys are ignored: quantum",)


def cut(name: str) -> Edit:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (cut(f"{MODULE}.qweight"), f"{MODULE}: its tensors' shapes fit none of the settings"),
        (cut(f"{MODULE}.scales"), f"{MODULE}: its tensors' shapes fit none of the settings"),
        (cut(f"{MODULE}.qzeros"), f"'{MODULE}.qzeros' is torch.int32 [2, 8], not torch.int32 [3, 8]"),
        (cut(f"{MODULE}.g_idx"), f"'{MODULE}.g_idx' is torch.int32 [95]"),
        (lambda t: t.pop(f"{MODULE}.scales"), f"tensor '{MODULE}.scales' is missing"),
        (lambda t: t.pop(f"{MODULE}.qzeros"), f"tensor '{MODULE}.qzeros' is missing"),
        (lambda t: t.pop(f"{MODULE}.qweight"), f"'{MODULE}.weight'"),
        (lambda t: t.update({f"{MODULE}.qweight": t[f"{MODULE}.qweight"].long()}), "is torch.int64"),
        (lambda t: t.update({f"{MODULE}.scales": t[f"{MODULE}.scales"].int()}), "is torch.int32"),
        (lambda t: t.update({f"{MODULE}.scales": t[f"{MODULE}.scales"].flatten()}), "has 1 dimensions, not 2"),
        (lambda t: t.update({f"{MODULE}.weight": torch.zeros(64, 96)}), f"does not have: '{MODULE}.weight'"),
        (lambda t: t.update({f"{MODULE}.bias": torch.ones(64)}), f"does not have: '{MODULE}.bias'"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).int()}), "model.norm.weight is torch.int32"),
        (lambda t: t.pop("model.norm.weight"), "tensors missing: 'model.norm.weight'"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, resave: Callable[..., None], edit: Edit, says: str) -> None:
    resave(folder, edit)
    assert says in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number(folder: Path, resave: Callable[..., None], value: float) -> None:
    resave(folder, lambda tensors: tensors[f"{MODULE}.scales"].__setitem__((2, 5), value))
    assert f"'{MODULE}.scales' has {value} at [2, 5]" in refusal(folder, read=True)


@pytest.mark.parametrize("group", [-1, 3])
def test_an_index_of_groups_that_there_are_not(folder: Path, resave: Callable[..., None], group: int) -> None:
    resave(folder, lambda tensors: tensors[f"{MODULE}.g_idx"].__setitem__(7, group))
    assert f"'{MODULE}.g_idx' names groups outside 0 to 2" in refusal(folder, read=True)


def test_a_zero_point_that_tools_read_differently(folder: Path, resave: Callable[..., None]) -> None:
    resave(folder, lambda tensors: tensors[f"{MODULE}.qzeros"].fill_(-1))
    assert f"'{MODULE}.qzeros' has a zero point of 16" in refusal(folder, read=True)


def test_biases_of_zeros_are_of_no_use(folder: Path, resave: Callable[..., None]) -> None:
    resave(folder, lambda tensors: tensors.update({f"{MODULE}.bias": torch.zeros(64, dtype=torch.float16)}))
    with open_foreign(resolve(folder)) as found:
        assert found.dense(f"{MODULE}.weight").shape == (64, 96)


def test_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pickled weights" in refusal(folder)


def test_a_plain_checkpoint_is_given_as_it_is(make_checkpoint: Callable[..., Path]) -> None:
    plain = make_checkpoint("llama", dtype=torch.float32)
    with open_foreign(resolve(plain)) as found:
        assert (found.tool, found.layers) == (None, {})
        assert found.dense(f"{MODULE}.weight").dtype == torch.float32
        assert found.nbytes(MODULE) == 64 * 96 * 4
