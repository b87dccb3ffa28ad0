"""What a unit does alone against conversions of that unit alone, and what --target-bpw may choose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lbq.conversion import convert
from lbq.evaluation import evaluate
from lbq.evaluation.mixed import Freedom, freedom
from lbq.evaluation.models import windows_of
from lbq.evaluation.sensitivity import measure
from lbq.evaluation.windows import Windows, read_text
from lbq.formats.errors import DataError, UsageError
from lbq.formats.quality import Estimate, Sensitivity
from lbq.quantizer.convert import write_artifact
from lbq.quantizer.original import open_original
from lbq.quantizer.prepare import prepare
from lbq.quantizer.request import make_request
from lbq.quantizer.source import resolve
from lbq.runtime.devices import CpuDevice, CudaDevice

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = CpuDevice(exact=True)
CONTEXT = 64
TEXT = "The lighthouse keeper climbed the stairs each evening at the same hour, carrying oil and a brass lamp. " * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def free(folder: Path, group: int | str | None = 32, **options: object) -> Freedom:
    return freedom(prepare(resolve(folder), make_request(4, group, **options)))  # type: ignore[arg-type]


def windows(folder: Path, text: Path) -> Windows:
    with open_original(resolve(folder)) as original:
        return windows_of(read_text(text), (original,), CONTEXT, None)


def made_up(of: Freedom) -> list[Sensitivity]:
    """Divergences that halve with every bit, and differ much by unit."""
    return [
        Sensitivity(u.modules, b, u.group(b), u.nbytes(b), Estimate(2.0**-b * (1 + i % 5) ** 3, None))
        for i, u in enumerate(of.units)
        for b in u.steps
    ]


@pytest.mark.parametrize("family", ["smollm2", "qwen2"])
def test_each_unit_alone(family: str, checkpoints: Mapping[str, Path], text: Path, tmp_path: Path) -> None:
    """The divergence of an artifact in which all else is kept."""
    folder = checkpoints[family]
    of = free(folder, 64)  # 96 inputs of down_proj: groups of 32 instead
    found = measure(of, windows(folder, text), CPU)
    assert [(s.modules, s.bits) for s in found] == [(u.modules, b) for u in of.units for b in (8, 4, 3)]
    assert [len(u.modules) for u in of.units] == [3, 1, 2, 1] * 2 + [1]
    every = [module for unit in of.units for module in unit.modules]
    for number in (0, 4 * 3 + 2, 7 * 3 + 1, 8 * 3, 8 * 3 + 2):  # qkv, gate and up, down, the head
        one = found[number]
        others = [module for module in every if module not in one.modules and module != "lm_head"]
        out = tmp_path / str(number)
        convert(
            folder,
            out,
            group=64,
            keep=others,
            overrides=[f"{m}={one.bits}" for m in one.modules],
            lm_head=16,
            device="cpu",
        )
        alone = evaluate(out, folder, text, context=CONTEXT, device="cpu").scores.kl
        assert one.kl.mean == pytest.approx(alone.mean, rel=1e-3)
        assert one.kl.standard_error == pytest.approx(alone.standard_error, rel=1e-2)
        assert alone.mean > 1e-7


def test_groups_of_students_change_nothing(checkpoints: Mapping[str, Path], text: Path) -> None:
    folder = checkpoints["llama"]
    of, cut = free(folder), windows(folder, text)
    told: list[tuple[int, int]] = []
    whole = measure(of, cut, CPU)
    parts = measure(of, cut, CPU, hidden_bytes=1, on_progress=lambda *at: told.append(at))
    assert parts == whole
    assert told == sorted(told)
    assert told[-1] == (27, 27)


@pytest.mark.gpu
def test_on_cuda(checkpoints: Mapping[str, Path], text: Path) -> None:
    folder = checkpoints["qwen2"]
    of, cut = free(folder), windows(folder, text)
    pairs = zip(measure(of, cut, CPU), measure(of, cut, CudaDevice(exact=True)), strict=True)
    for cpu, cuda in pairs:
        assert cuda.kl.mean == pytest.approx(cpu.kl.mean, rel=1e-2)


def test_what_is_decided_is_not_measured(checkpoints: Mapping[str, Path]) -> None:
    of = free(checkpoints["smollm2"], keep=["layers.0.mlp.down_proj"], overrides=["q_proj=3"], lm_head=8)
    assert [u.modules[0].split("layers.")[1] for u in of.units] == [
        *("0.self_attn.o_proj", "0.mlp.gate_proj", "1.self_attn.o_proj", "1.mlp.gate_proj", "1.mlp.down_proj"),
    ]
    assert free(checkpoints["smollm2"]).units[-1].modules == ("lm_head",)
    assert [u.layer for u in free(checkpoints["smollm2"]).units] == [0] * 4 + [1] * 4 + [2]
    assert {tuple(u.steps) for u in free(checkpoints["llama"], readers=["sglang"]).units} == {(8, 4)}
    with pytest.raises(UsageError, match="leave nothing to choose"):
        free(checkpoints["llama"], overrides=["layers=8"], lm_head=8)


@pytest.mark.parametrize(
    "options", [{}, {"lm_head": 8}, {"lm_head": 16}, {"keep": ["layers.0"], "overrides": ["down_proj=8"]}]
)
def test_a_choice_keeps_to_the_size(options: dict[str, object], checkpoints: Mapping[str, Path]) -> None:
    of = free(checkpoints["smollm2"], **options)
    sensitivity = made_up(of)
    last = float("inf")
    for share in (0, 0.1, 0.3, 0.5, 0.8, 1):
        target = of.least + share * (of.most - of.least)
        chosen = of.choose(sensitivity, target)
        plan = chosen.prepared.plan
        assert plan.bits_per_weight == pytest.approx(chosen.point.bits_per_weight)
        assert plan.bits_per_weight <= target + 1e-12
        assert chosen.point.nbytes == sum(s.packed_bytes for s in plan.steps if hasattr(s, "packed_bytes"))
        assert [plan.quantized[u.modules[0]].bits for u in of.units] == list(chosen.point.bits)
        predicted = {(s.modules, s.bits): s.kl.mean for s in sensitivity}
        assert chosen.point.predicted_kl == pytest.approx(
            sum(predicted[u.modules, b] for u, b in zip(of.units, chosen.point.bits, strict=True))
        )
        assert chosen.point.predicted_kl <= last
        last = chosen.point.predicted_kl
        assert chosen.point in chosen.frontier
        assert list(chosen.frontier) == sorted(chosen.frontier, key=lambda point: point.nbytes)
        assert set(of.frontier(sensitivity)) - set(chosen.frontier) == set()
    assert set(of.choose(sensitivity, of.least).point.bits) == {3}
    assert set(of.choose(sensitivity, of.most).point.bits) == {8}


@pytest.mark.parametrize("target", [0.0, 3.0, 8.5, -1.0, float("nan"), float("inf")])
def test_sizes_out_of_reach(target: float, checkpoints: Mapping[str, Path]) -> None:
    of = free(checkpoints["llama"])
    with pytest.raises(UsageError, match=r"--target-bpw \S+: this model takes 3\.5\S* to 8\.\d+ bits a weight"):
        of.choose(made_up(of), target)


def test_the_chosen_is_what_is_written(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    of = free(checkpoints["llama"])
    chosen = of.choose(made_up(of), 4.2)
    made = write_artifact(chosen.prepared, tmp_path / "out", device="cpu")
    assert made.manifest.method.target_bpw == 4.2
    assert made.manifest.summary.bits_per_weight == chosen.point.bits_per_weight
    bits = [made.manifest.quantized[u.modules[0]].bits for u in of.units]
    assert bits == list(chosen.point.bits)
    assert len(set(bits)) == 3


def test_a_weight_that_has_no_code(make_checkpoint, text: Path) -> None:  # type: ignore[no-untyped-def]
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")

    folder = make_checkpoint(edit=spoil)
    with pytest.raises(DataError, match=r"down_proj.weight has nan at \[3, 5\]"):
        measure(free(folder), windows(folder, text), CPU)
