"""What becomes of every tensor, decided from headers: groups, fused units, heads, and what is said or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lbq.formats.errors import DataError, UsageError
from lbq.formats.safetensors_file import open_checkpoint
from lbq.formats.scheme import Scheme
from lbq.quantizer.plan import Keep, Plan, Quantize
from lbq.quantizer.prepare import prepare, replan
from lbq.quantizer.request import MixedBits, make_request
from lbq.quantizer.source import SourceFolder

LAYER = "model.layers.0."


def plan(folder: Path, bits: int = 4, group: int | str | None = 32, **options: object) -> Plan:
    return prepare(SourceFolder(folder, folder.name), make_request(bits, group, **options)).plan  # type: ignore[arg-type]


def groups(made: Plan) -> dict[int, set[int]]:
    """Groups by number of inputs, the head left out."""
    found: dict[int, set[int]] = {}
    for name, entry in made.quantized.items():
        if name != "lm_head":
            found.setdefault(entry.k, set()).add(entry.group)
    return found


def test_every_linear_is_quantized(family: str, checkpoints: Mapping[str, Path]) -> None:
    made = plan(checkpoints[family])
    assert list(made.quantized) == sorted(p.name for p in made.spec.projections())
    assert {entry.bits for name, entry in made.quantized.items() if name != "lm_head"} == {4}
    assert made.quantized["lm_head"].scheme == Scheme(8, None)
    assert made.dense_linears == []
    assert made.notes == ()
    assert not made.spec.tied
    with open_checkpoint(checkpoints[family]) as checkpoint:
        assert {step.source for step in made.steps} == set(checkpoint.names())
    if "qwen2" in family:
        assert made.dense[f"{LAYER}self_attn.q_proj.bias"].shape == (64,)


def test_bits_per_weight_and_bytes(checkpoints: Mapping[str, Path]) -> None:
    made = plan(checkpoints["llama"])
    weights = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    head = 264 * 64
    assert made.bits_per_weight == pytest.approx((weights * 4.5 + head * 8 + 264 * 16) / (weights + head))
    dense = 2 * (264 * 64 + 5 * 64)
    shapes = 16 * len(made.quantized)
    assert made.nbytes == dense + shapes + (weights * 4.5 + head * 8 + 264 * 16) / 8


@pytest.mark.parametrize(
    ("width", "asked", "given"),
    [
        (96, 64, 32),
        (96, 512, 32),
        (192, 256, 64),
        (576, 256, 64),
        (4304, 128, None),
        (67, 32, None),
        (1, 128, None),
        (128, 128, None),
        (256, 128, 128),
        (256, 512, None),
        (1536, 512, 512),
    ],
)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups_that_do_not_fit_fall_back(
    width: int, asked: int, given: int | None, bits: int, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint(intermediate_size=width, num_hidden_layers=1)
    made = plan(folder, bits, asked, lm_head=16)
    entry = made.quantized[f"{LAYER}mlp.down_proj"]
    assert entry.scheme == Scheme(bits, given)
    said = [note for note in made.notes if note.startswith(f"{width} inputs")]
    assert len(said) == (width % asked != 0)
    if said:
        what = f"groups of {given}" if given else "one scale a row"
        assert said == [f"{width} inputs do not divide into groups of {asked}: {what} instead (1 layer)"]
        with pytest.raises(UsageError, match=r"refused under --strict: .* inputs do not divide"):
            plan(folder, bits, asked, lm_head=16, strict=True)


def test_strict_takes_what_needs_no_note(checkpoints: Mapping[str, Path]) -> None:
    assert plan(checkpoints["llama"], strict=True) == plan(checkpoints["llama"])


def test_unknown_keys_are_said_and_refused(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(attn_logit_cap=3.0)
    assert plan(folder).notes == ("config.json: unknown keys are ignored: attn_logit_cap",)
    with pytest.raises(UsageError, match=r"refused under --strict: config\.json: unknown keys .* attn_logit_cap"):
        plan(folder, strict=True)


@pytest.mark.parametrize(
    ("options", "parts", "leaves"),
    [
        ({"keep": ["q_proj"]}, ("q_proj", "k_proj", "v_proj"), None),
        ({"keep": ["layers.0.self_attn.k_proj"]}, ("q_proj", "k_proj", "v_proj"), None),
        ({"overrides": ["gate_proj=8"]}, ("gate_proj", "up_proj"), Scheme(8, None)),
        ({"overrides": ["gate_proj=8", "up_proj=3:32"]}, ("gate_proj", "up_proj"), Scheme(3, 32)),
        ({"overrides": ["gate_proj=8"], "keep": ["up_proj"]}, ("gate_proj", "up_proj"), None),
    ],
)
def test_a_fused_unit_is_never_split(
    options: dict[str, list[str]], parts: tuple[str, ...], leaves: Scheme | None, checkpoints: Mapping[str, Path]
) -> None:
    made = plan(checkpoints["llama"], **options)
    schemes = {name.rpartition(".")[2]: entry.scheme for name, entry in made.quantized.items() if LAYER in name}
    assert {schemes.get(part) for part in parts} == {leaves}
    (said,) = made.notes
    assert "fused: widened to all of them" in said
    assert all(part in said for part in parts)
    assert said.endswith("(1 unit)" if "layers.0" in str(options) else "(2 units)")
    with pytest.raises(UsageError, match="refused under --strict"):
        plan(checkpoints["llama"], strict=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": ["q_proj", "k_proj", "v_proj"]},
        {"keep": ["[qkv]_proj"]},
        {"overrides": ["gate_proj=8", "up_proj=8"]},
        {"overrides": ["q_proj=4:32"]},
        {"keep": ["down_proj", "o_proj"], "overrides": ["mlp=8"]},
    ],
)
def test_a_request_that_splits_nothing_is_not_widened(
    options: dict[str, list[str]], checkpoints: Mapping[str, Path]
) -> None:
    assert plan(checkpoints["llama"], strict=True, **options).notes == ()


def test_keep_wins_and_the_last_override_wins(checkpoints: Mapping[str, Path]) -> None:
    made = plan(checkpoints["llama"], keep=["layers.0"], overrides=["down_proj=8", "layers.1.mlp.down_proj=3:32"])
    assert not any(LAYER in name for name in made.quantized)
    assert len(made.dense_linears) == 7
    assert made.quantized["model.layers.1.mlp.down_proj"].scheme == Scheme(3, 32)
    assert made.quantized["model.layers.1.self_attn.o_proj"].scheme == Scheme(4, 32)


@pytest.mark.parametrize(
    ("lm_head", "head"), [(None, Scheme(3, 32)), (8, Scheme(8, None)), (4, Scheme(4, 32)), (16, None)]
)
def test_mixed_bits(lm_head: int | None, head: Scheme | None, checkpoints: Mapping[str, Path]) -> None:
    """Bits by unit; --set, --keep and --lm-head go before them."""
    folder = checkpoints["smollm2"]
    request = make_request(
        4, 32, lm_head=lm_head, keep=["layers.0.mlp"], overrides=["layers.1.self_attn.[qkv]_proj=3:row"]
    )
    uniform = prepare(SourceFolder(folder, folder.name), request)
    bits = (3, 8, 3, 4, 4, 4, 8, 3, 3)
    mixed = replan(uniform, replace(request, mixed=MixedBits(4.5, bits)))
    found = mixed.plan.quantized
    schemes = [found[unit[0].name].scheme if unit[0].name in found else None for unit in mixed.plan.spec.units()]
    row8, four, three = Scheme(8, None), Scheme(4, 32), Scheme(3, 32)
    assert schemes == [three, row8, None, None, Scheme(3, None), four, row8, three, head]
    assert mixed.plan.spec.tied == (lm_head == 16)
    assert (uniform.default_name(), mixed.default_name(4.5)) == ("smollm2-int4-g32", "smollm2-4.5bpw-g32")
    assert replan(mixed, request).plan == uniform.plan


@pytest.mark.parametrize(
    "options", [{"keep": ["q_porj"]}, {"overrides": ["layers.2=8"]}, {"keep": ["embed_tokens"]}, {"keep": [""]}]
)
def test_a_pattern_that_names_nothing(options: dict[str, list[str]], checkpoints: Mapping[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"names no linear layer of this model, such as model\.layers"):
        plan(checkpoints["llama"], **options)


def test_nothing_to_quantize(checkpoints: Mapping[str, Path]) -> None:
    with pytest.raises(UsageError, match="nothing would be quantized"):
        plan(checkpoints["llama"], keep=["*"])


@pytest.mark.parametrize("family", ["llama", "smollm2"])
@pytest.mark.parametrize(
    ("bits", "group", "lm_head", "scheme"),
    [
        (4, 64, 8, Scheme(8, None)),
        (4, 32, 4, Scheme(4, 32)),
        (4, "row", 4, Scheme(4, None)),
        (3, 32, 4, Scheme(4, 32)),
        (8, None, 4, Scheme(4, None)),  # groups of 128 are asked for, of which 64 inputs hold none
        (8, 32, 4, Scheme(4, 32)),
        (4, 32, 16, None),
    ],
)
def test_head(
    family: str,
    bits: int,
    group: int | str | None,
    lm_head: int,
    scheme: Scheme | None,
    checkpoints: Mapping[str, Path],
) -> None:
    made = plan(checkpoints[family], bits, group, lm_head=lm_head)
    tied_source = family == "smollm2"
    assert made.spec.tied == (tied_source and scheme is None)
    if scheme is None:
        assert ("lm_head.weight" in made.dense) == (not tied_source)
        assert "lm_head" in made.dense_linears
    else:
        assert made.quantized["lm_head"].scheme == scheme
        (step,) = (s for s in made.steps if isinstance(s, Quantize) and s.module == "lm_head")
        assert step.source == ("model.embed_tokens.weight" if tied_source else "lm_head.weight")
    assert made.dense["model.embed_tokens.weight"].shape == (264, 64)


def test_int4_head_beside_int8_rows_gets_groups(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(hidden_size=256, num_hidden_layers=1)
    assert plan(folder, 8, None, lm_head=4).quantized["lm_head"].scheme == Scheme(4, 128)


def test_a_head_that_is_saved_although_tied(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(
        "smollm2", edit=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    made = plan(folder)
    assert made.notes == ()
    assert "model.embed_tokens.weight" in {s.source for s in made.steps if isinstance(s, Quantize)}
    assert plan(folder, lm_head=16).spec.tied


@pytest.mark.parametrize("lm_head", [8, 16])
def test_a_tied_head_that_differs(lm_head: int, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("smollm2", edit=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    made = plan(folder, lm_head=lm_head)
    assert not made.spec.tied
    assert made.notes == (
        "the config ties the head to the embedding, the checkpoint saves another: the saved one is used",
    )
    assert "lm_head.weight" in {step.source for step in made.steps}
    with pytest.raises(UsageError, match="refused under --strict: the config ties"):
        plan(folder, lm_head=lm_head, strict=True)


@pytest.mark.parametrize("bad", [(), (264,), (0, 64)])
def test_a_tied_head_of_another_shape(bad: tuple[int, ...], make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("smollm2", edit=lambda t: t.update({"lm_head.weight": torch.zeros(bad)}))
    with pytest.raises(DataError, match="lm_head"):
        plan(folder)


def test_groups_for_other_readers(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    made = plan(folder, 4, 256, readers=["vllm", "sglang"])
    steps = [step for step in made.steps if isinstance(step, Quantize) and step.module != "lm_head"]
    assert {(step.group, step.entry.group) for step in steps} == {(256, 128)}
    assert groups(plan(folder, 4, 64, readers=["vllm"])) == {512: {64}, 1024: {64}}
    assert groups(plan(folder, 4, "row", readers=["vllm"])) == {512: {512}, 1024: {1024}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_casts_are_said(dtype: torch.dtype, make_checkpoint: Callable[..., Path]) -> None:
    (note,) = plan(make_checkpoint(dtype=dtype)).notes
    assert note == f"tensors that stay are rounded from {str(dtype).removeprefix('torch.')} to bfloat16"


def test_dtypes_that_are_no_weights(make_checkpoint: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}mlp.up_proj.weight"] = tensors[f"{LAYER}mlp.up_proj.weight"].to(torch.int8)

    with pytest.raises(DataError, match=r"mlp\.up_proj\.weight is torch\.int8"):
        plan(make_checkpoint(edit=edit))


def test_missing_and_unknown_tensors_are_listed(
    make_checkpoint: Callable[..., Path], resave: Callable[..., None]
) -> None:
    folder = make_checkpoint()
    resave(folder, lambda t: t.update({f"{LAYER}mlp.extra.weight": torch.zeros(1), "b": torch.zeros(1)}))
    with pytest.raises(DataError, match=r"does not have: 'b', 'model\.layers\.0\.mlp\.extra\.weight'$"):
        plan(folder)
    resave(folder, lambda t: [t.pop(name) for name in list(t) if name == "b" or LAYER in name])
    with pytest.raises(DataError, match=r"tensors missing: 'model\.layers\.0\.input_layernorm.*and 4 more; fetch"):
        plan(folder)


def test_buffers_of_old_checkpoints_are_left_out(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(edit=lambda t: t.update({f"{LAYER}self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    made = plan(folder, strict=True)
    assert not any("rotary" in step.source for step in made.steps)


def test_a_shape_that_is_not_the_configs(make_checkpoint: Callable[..., Path], resave: Callable[..., None]) -> None:
    folder = make_checkpoint()
    resave(folder, lambda t: t.update({f"{LAYER}mlp.up_proj.weight": torch.zeros(64, 96)}))
    with pytest.raises(DataError, match=r"up_proj\.weight is \[64, 96\], the config says \[96, 64\]"):
        plan(folder)


def test_layers_lie_together_in_their_order(make_checkpoint: Callable[..., Path]) -> None:
    made = plan(make_checkpoint(num_hidden_layers=11))
    names = [step.name if isinstance(step, Keep) else step.module for step in made.steps]
    numbers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(11))


def test_only_headers_are_read(make_checkpoint: Callable[..., Path]) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(float("nan"))

    assert plan(make_checkpoint(edit=poison)).notes == ()
