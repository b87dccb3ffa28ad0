"""AutoRound conversions: auto-round's own numbers in lbq's format, under lbq's plan."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lbq.conversion import convert
from lbq.formats.artifact import open_artifact
from lbq.formats.errors import DataError, UsageError
from lbq.formats.manifest import AutoRound
from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import open_checkpoint
from lbq.quantizer import rtn
from lbq.quantizer.autoround import tuner
from lbq.quantizer.autoround.blocks import Block, Blocks
from lbq.quantizer.autoround.run import Progress
from lbq.quantizer.convert import Conversion
from lbq.quantizer.families import read_spec
from lbq.quantizer.plan import Quantize, keep_all
from lbq.quantizer.prepare import prepare
from lbq.quantizer.quiet import quiet
from lbq.quantizer.request import make_request
from lbq.quantizer.source import resolve


@pytest.fixture(scope="module", autouse=True)
def light() -> Iterator[None]:
    """auto-round collects garbage several times a block; not among all that its import has made."""
    with quiet():
        import auto_round  # noqa: F401
    gc.collect()
    gc.freeze()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.unfreeze()


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    letters = random.Random(3).choices("the quick brown fox", k=4000)
    path.write_text("".join(letters))
    return str(path)


@pytest.fixture
def tune(text: str, tmp_path: Path) -> Callable[..., Conversion]:
    """``tune(source, …)``: the smallest conversion that tunes anything."""

    def run(source: Path, out: str = "out", **options: Any) -> Conversion:
        small = {"iters": 2, "nsamples": 4, "seqlen": 16, "batch_size": 2, "calib": text, "group": 32}
        return convert(source, tmp_path / out, method="autoround", **{"device": "cpu", **small, **options})

    return run


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Dequantised weights and scales as auto-round leaves them, by module."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    packed = tuner._packed

    def record(linear: Any, step: Any, fallback: PackedWeight) -> PackedWeight:
        found[step.module] = (linear.weight.detach().clone(), linear.scale.clone())
        return packed(linear, step, fallback)

    monkeypatch.setattr(tuner, "_packed", record)
    return found


def test_exact(
    family: str,
    checkpoints: Mapping[str, Path],
    tune: Callable[..., Conversion],
    recorded: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """What a reader dequantises is auto-round's weight, bit for bit."""
    done = tune(checkpoints[family], bits=3 if family == "qwen3" else 4)
    layers = [p.name for p in done.manifest.spec.projections() if p.name != "lm_head"]
    assert sorted(recorded) == sorted(layers)
    with open_artifact(done.path) as artifact:
        for module, (weight, scales) in recorded.items():
            packed = artifact.packed(module)
            assert torch.equal(packed.dequantize(), weight), module
            assert torch.equal(packed.scales, scales.view_as(packed.scales)), module
    assert not os.path.lexists(done.path.with_name(".out.work"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, dict.fromkeys(("nsamples", "seqlen", "batch_size", "calib")) | {"iters": 0}])
def test_on_cuda(
    checkpoints: Mapping[str, Path],
    tune: Callable[..., Conversion],
    recorded: dict[str, tuple[torch.Tensor, torch.Tensor]],
    options: dict[str, Any],
) -> None:
    """A block goes on to give hidden states after auto-round has had it."""
    done = tune(checkpoints["llama"], device="cuda", **options)
    assert isinstance(done.manifest.method, AutoRound)
    assert done.manifest.method.device == "cuda"
    with open_artifact(done.path) as artifact:
        for module, (weight, _) in recorded.items():
            assert torch.equal(artifact.packed(module).dequantize(), weight.cpu()), module


def test_a_block_comes_back(
    checkpoints: Mapping[str, Path], tune: Callable[..., Conversion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto-round leaves blocks on the CPU, where a GPU's hidden states are not."""
    moved: list[torch.device] = []
    quantize = tuner._quantize_block

    def quantize_block(block: Any, *args: Any) -> None:
        quantize(block, *args)
        monkeypatch.setattr(block, "to", moved.append)

    monkeypatch.setattr(tuner, "_quantize_block", quantize_block)
    tune(checkpoints["llama"])
    assert moved == [torch.device("cpu")] * 2


def test_blocks_compute_what_transformers_computes(family: str, checkpoints: Mapping[str, Path]) -> None:
    """Masks, windows, positions and weights, without ever having the model."""
    folder = checkpoints[family]
    length = 24
    with quiet(), torch.no_grad():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens = torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(0))
        states = model(tokens, output_hidden_states=True).hidden_states
    spec, checkpoint = read_spec(folder).spec, open_checkpoint(folder)
    blocks = Blocks(folder, keep_all(spec, checkpoint), checkpoint, torch.device("cpu"))
    hidden = blocks.embedded(tokens).float()
    assert torch.equal(hidden, states[0])
    for number in range(len(blocks) - 1):  # transformers norms what leaves the last
        with torch.no_grad():
            hidden = blocks.load(number, length)(hidden)
        torch.testing.assert_close(hidden, states[number + 1], rtol=1e-5, atol=1e-5)
    last = blocks.load(len(blocks) - 1, length)
    norm = model.get_decoder().norm
    with torch.no_grad():
        torch.testing.assert_close(norm(last(hidden)), states[-1], rtol=1e-5, atol=1e-5)


def test_the_plan_decides(
    checkpoints: Mapping[str, Path],
    tune: Callable[..., Conversion],
    recorded: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Mixed bits, kept layers, a group that does not divide, and readers' groups."""
    options = {"overrides": ["down_proj=8:row", "layers.1.mlp.up_proj=3"], "keep": ["o_proj"], "lm_head": 4}
    done = tune(checkpoints["llama"], group=256, readers=["vllm"], **options)
    entries = done.manifest.quantized
    assert "model.layers.0.self_attn.o_proj" not in entries
    assert entries["model.layers.1.mlp.gate_proj"].bits == 3  # fused with up_proj
    assert (entries["model.layers.0.mlp.down_proj"].bits, entries["model.layers.0.mlp.down_proj"].group) == (8, 96)
    assert entries["model.layers.0.self_attn.q_proj"].group == 64
    assert sorted(recorded) == sorted(entries.keys() - {"lm_head"})
    with open_artifact(done.path) as artifact:
        for module, (weight, _) in recorded.items():
            assert torch.equal(artifact.packed(module).dequantize(), weight), module
        kept = artifact.dense("model.layers.0.self_attn.o_proj.weight")
    with open_checkpoint(checkpoints["llama"]) as source:
        assert torch.equal(kept, source.tensor("model.layers.0.self_attn.o_proj.weight"))
        head = rtn.quantize(source.tensor("lm_head.weight"), 4)
    with open_artifact(done.path) as artifact:
        assert torch.equal(artifact.packed("lm_head").words, head.words)


def test_a_search_group_wider_than_the_stored(
    make_checkpoint: Callable[..., Path],
    tune: Callable[..., Conversion],
    recorded: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    source = make_checkpoint(num_hidden_layers=1, intermediate_size=512)
    done = tune(source, group=256, readers=["vllm"])
    module = "model.layers.0.mlp.down_proj"
    assert done.manifest.quantized[module].group == 128
    with open_artifact(done.path) as artifact:
        packed = artifact.packed(module)
    assert torch.equal(packed.scales[:, 0], packed.scales[:, 1])
    assert torch.equal(packed.dequantize(), recorded[module][0])


def test_small_groups_are_not_zeroed(
    make_checkpoint: Callable[..., Path],
    tune: Callable[..., Conversion],
    recorded: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """auto-round clamps scales at 1e-5; those groups come from lbq's round to nearest."""
    module = "model.layers.0.mlp.up_proj"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"{module}.weight"]
        weight[:, :32] *= 1e-6
        weight[3] = 0

    source = make_checkpoint(num_hidden_layers=1, edit=edit)
    done = tune(source)
    with open_checkpoint(source) as checkpoint, open_artifact(done.path) as artifact:
        weight, packed = checkpoint.tensor(f"{module}.weight").clone(), artifact.packed(module)
        own = rtn.quantize(weight, 4, 32)
        assert (recorded[module][0][4, :32] == 0).any(), "auto-round does not zero them: this test is void"
        assert torch.equal(packed.scales[:, 0], own.scales[:, 0])
        assert torch.equal(packed.dequantize()[:, :32], own.dequantize()[:, :32])
        assert bool((packed.dequantize()[3] == 0).all())
        other = packed.dequantize()[4:, 32:]
        assert torch.equal(other, recorded[module][0][4:, 32:])


def test_a_gpu_that_fails(
    checkpoints: Mapping[str, Path], lbq: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(tuner, "_quantize_block", fail)
    small = ("--iters", "2", "--nsamples", "4", "--seqlen", "16", "--batch-size", "2", "--calib", text, "--gs", "32")
    done = lbq("convert", checkpoints["llama"], "--method", "autoround", *small, "--out", tmp_path / "out")
    assert done.code == 7
    assert "lbq: error: the GPU fails: AcceleratorError: CUDA error: an illegal memory access was" in done.err
    assert not (tmp_path / "out").exists()


EDGES: dict[str, Callable[[torch.Tensor], object]] = {
    "zeros": lambda weight: weight.zero_(),
    "constant": lambda weight: weight.fill_(0.25),
    "one sign": lambda weight: weight.abs_(),
    "subnormal": lambda weight: weight.mul_(1e-39),
    "one large": lambda weight: weight[0, :1].fill_(1e38),
    "all large": lambda weight: weight.mul_(1e38),
}


@pytest.mark.parametrize("edge", EDGES)
def test_odd_weights(edge: str, make_checkpoint: Callable[..., Path], tune: Callable[..., Conversion]) -> None:
    """Whatever the activations become, scales are finite and no error is above round to nearest's by much."""
    module = "model.layers.0.mlp.gate_proj"
    source = make_checkpoint(edit=lambda tensors: EDGES[edge](tensors[f"{module}.weight"]))
    done = tune(source)
    with open_checkpoint(source) as checkpoint, open_artifact(done.path) as artifact:
        weight, packed = checkpoint.tensor(f"{module}.weight").float(), artifact.packed(module)
        assert bool(packed.scales.isfinite().all())
        steps = (packed.dequantize() - weight).abs() / packed.scales.float().abs().repeat_interleave(32, dim=1)
        assert float(steps.max()) <= 2.1  # a weight at the far end of a group may be clamped
        assert bool((packed.dequantize()[weight == 0] == 0).all()) or edge != "zeros"


def test_no_pages_of_the_source_stay(checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block they would add up to the model."""
    prepared = prepare(resolve(checkpoints["llama"]), make_request(4, 32))
    steps = [step for step in prepared.plan.steps if isinstance(step, Quantize)]
    released: list[str] = []
    monkeypatch.setattr(prepared.checkpoint, "release", released.append)
    tuner.rounded(prepared.checkpoint, steps, torch.device("cpu"))
    assert released == [step.source for step in steps]


@pytest.mark.parametrize("value", [0.3, float("nan"), 1e6])
def test_what_is_not_codes_times_scales(
    value: float, checkpoints: Mapping[str, Path], tune: Callable[..., Conversion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's weights decide what auto-round makes: it is an error of the data and no bug."""
    quantize = tuner._quantize_block

    def spoil(block: Block, *arguments: Any) -> None:
        quantize(block, *arguments)
        linear = block.linear("model.layers.0.mlp.up_proj")
        linear.weight.data[3, 5] = value * linear.scale.flatten()[0].float()

    monkeypatch.setattr(tuner, "_quantize_block", spoil)
    with pytest.raises(
        DataError, match=r"^model\.layers\.0\.mlp\.up_proj: what AutoRound made of it is not .*--keep model"
    ):
        tune(checkpoints["llama"])


def test_sides_that_auto_round_leaves_alone(
    make_checkpoint: Callable[..., Path], tune: Callable[..., Conversion]
) -> None:
    source = make_checkpoint(num_hidden_layers=1, intermediate_size=80)
    done = tune(source)
    assert [note for note in done.manifest.notes if "not divisible by 32" in note] == [
        "3 layers of sides not divisible by 32: rounded to nearest, AutoRound leaves them"
    ]
    module = "model.layers.0.mlp.gate_proj"
    with open_checkpoint(source) as checkpoint, open_artifact(done.path) as artifact:
        own = rtn.quantize(checkpoint.tensor(f"{module}.weight"), 4, 32)
        assert torch.equal(artifact.packed(module).words, own.words)
    with pytest.raises(UsageError, match="refused under --strict"):
        tune(source, "other", strict=True)


def test_tuning_pays(checkpoints: Mapping[str, Path], tune: Callable[..., Conversion]) -> None:
    told: list[Progress] = []
    tune(checkpoints["llama"], bits=3, iters=40, nsamples=8, seqlen=64, on_tuned=told.append)
    assert [(p.finished, p.blocks) for p in told] == [(0, 2), (1, 2), (2, 2)]
    assert told[0].loss is None
    for progress in told[1:]:
        assert progress.loss is not None
        before, after = progress.loss
        assert after < 0.9 * before


def test_the_same_bytes_again(checkpoints: Mapping[str, Path], tune: Callable[..., Conversion]) -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)
    one = tune(checkpoints["smollm2"], "one")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    two = tune(checkpoints["smollm2"], "two")
    assert expected == (random.random(), np.random.random(), torch.rand(1)), "a generator of the caller's was moved"
    assert content(one.path) == content(two.path)
    assert content(tune(checkpoints["smollm2"], "three", seed=1).path) != content(one.path)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_manifest_says_how(checkpoints: Mapping[str, Path], tune: Callable[..., Conversion], text: str) -> None:
    done = tune(checkpoints["llama"])
    method = done.manifest.method
    assert isinstance(method, AutoRound)
    assert (method.name, method.iterations, method.batch, method.seed, method.device) == ("autoround", 2, 2, 42, "cpu")
    assert method.calibration is not None
    assert (method.calibration.name, method.calibration.samples, method.calibration.tokens) == ("text.txt", 4, 16)
    assert set(done.manifest.tools) == {"lbq", "torch", "auto-round", "transformers"}
    with open_artifact(done.path) as artifact:
        assert artifact.manifest == done.manifest
    written = json.loads((done.path / "lbq.json").read_text())
    assert text not in json.dumps(written), "a path of whoever converted"


def test_no_iterations(
    checkpoints: Mapping[str, Path],
    tmp_path: Path,
    recorded: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """auto-round's round to nearest: no text, and its numbers exactly."""
    done = convert(checkpoints["qwen2"], tmp_path / "out", method="autoround", iters=0, group=32, device="cpu")
    assert isinstance(done.manifest.method, AutoRound)
    assert done.manifest.method.calibration is None
    assert recorded
    with open_artifact(done.path) as artifact:
        for module, (weight, _) in recorded.items():
            assert torch.equal(artifact.packed(module).dequantize(), weight)


def test_short_context_and_text(checkpoints: Mapping[str, Path], tune: Callable[..., Conversion]) -> None:
    done = tune(checkpoints["llama"], seqlen=500, nsamples=60, iters=1)
    text_notes = [note for note in done.manifest.notes if "samples" in note]
    assert len(text_notes) == 2
    assert text_notes[0] == "calibration samples have 128 tokens, not 500: the model's context"
    assert text_notes[1].endswith("text.txt gives 31 samples of 128 tokens, 60 were asked for")
    with pytest.raises(UsageError, match="refused under --strict"):
        tune(checkpoints["llama"], "other", seqlen=500, strict=True)


def test_broken_weights_are_found_at_once(
    make_checkpoint: Callable[..., Path], tune: Callable[..., Conversion], tmp_path: Path
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = torch.nan

    told: list[Progress] = []
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has nan at \[5, 7\]"):
        tune(make_checkpoint(edit=edit), on_tuned=told.append)
    assert told == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq"}, "--method gptq: rtn or autoround"),
        ({"iters": 5}, "--iters has no effect on --method rtn"),
        ({"calib": "a.txt"}, "--calib has no effect on --method rtn"),
        ({"restart": True}, "--restart has no effect"),
        ({"method": "autoround", "iters": -1}, "--iters -1: 0 or more"),
        ({"method": "autoround", "nsamples": 0}, "--nsamples 0: 1 or more"),
        ({"method": "autoround", "seqlen": 1}, "--seqlen 1: 2 or more"),
        ({"method": "autoround", "batch_size": 0}, "--batch-size 0: 1 or more"),
        ({"method": "autoround", "seed": -1}, "--seed -1: 0 or more"),
        ({"method": "autoround", "iters": 0, "calib": "a.txt"}, "--calib has no effect with --iters 0"),
    ],
)
def test_options(options: dict[str, Any], message: str, checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        convert(checkpoints["llama"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
