"""`lbq run CHECKPOINT --bits` and `lbq.load(…, bits=…)`: what a conversion would give, and nothing written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stub import Hub

import lbq as package
from lbq.conversion import convert
from lbq.formats.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

Lbq = Callable[..., Any]
IDS = list(range(40))
SHORT = ("--device", "cpu", "--max-tokens", "8", "--temperature", "0", "-p", "hello")


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("family", ["smollm2", "qwen2"])  # tied; biases
def test_logits_of_the_artifact(checkpoints: Mapping[str, Path], tmp_path: Path, family: str, dtype: Any) -> None:
    wish: dict[str, Any] = {"bits": 3, "group": 64, "keep": ["layers.0.mlp.down_proj"], "overrides": ["o_proj=8"]}
    written = convert(checkpoints[family], tmp_path / "out", device="cpu", **wish)
    notes: list[str] = []
    how: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    with package.load(written.path, **how) as artifact:
        expected = artifact.logits(IDS)
        kernels = artifact.kernels()
    before = sorted(os.walk(tmp_path))
    with package.load(checkpoints[family], on_note=notes.append, **wish, **how) as model:
        assert torch.equal(model.logits(IDS), expected)
        assert model.kernels() == kernels
        assert model.seconds_to_bind > 0
    assert notes == list(written.manifest.notes) != []
    assert sorted(os.walk(tmp_path)) == before


@pytest.mark.gpu
def test_on_a_gpu(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    written = convert(checkpoints["qwen2"], tmp_path / "out", bits=3, group=32, device="cuda")
    with (
        package.load(written.path, device="cuda") as artifact,
        package.load(checkpoints["qwen2"], bits=3, group=32, device="cuda") as model,
    ):
        assert torch.equal(model.logits(IDS), artifact.logits(IDS))
        assert model.resident_bytes == artifact.resident_bytes


def test_run(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = (
        "--bits",
        "3",
        "--gs",
        "64",
        "--lm-head",
        "4",
        "--keep",
        "o_proj",
        "--set",
        "layers.1.mlp.down_proj=8:32",
    )
    at_load = lbq("run", checkpoints["llama"], *SHORT, *options)
    assert at_load.code == 0, at_load
    assert os.listdir() == []
    assert lbq("convert", checkpoints["llama"], *options, "--out", "out").code == 0
    artifact = lbq("run", "out", *SHORT)
    assert at_load.out == artifact.out
    notes = [line for line in at_load.err.splitlines() if line.startswith("note: ")]
    assert notes == ["note: 96 inputs do not divide into groups of 64: groups of 32 instead (1 layer)"]
    *lines, last = at_load.err.splitlines()[1:]
    assert re.fullmatch(r"\[INT3, group 64, quantized at load in \d+\.\d s\]", last)
    assert [line for line in lines if " × " in line] == [line for line in artifact.err.splitlines() if " × " in line]


def test_strict(checkpoints: Mapping[str, Path], lbq: Lbq) -> None:
    done = lbq("run", checkpoints["llama"], *SHORT, "--bits", "4", "--gs", "64", "--strict")
    assert (done.code, "refused under --strict: 96 inputs" in done.error) == (2, True)
    assert lbq("run", checkpoints["llama"], *SHORT, "--bits", "4", "--gs", "32", "--strict").code == 0


def test_a_checkpoint_without_bits(hub: Hub, checkpoints: Mapping[str, Path], lbq: Lbq) -> None:
    hub.add("someone/model", {"config.json": b"{}"})
    for model in (checkpoints["llama"], "someone/model"):
        done = lbq("run", model, *SHORT)
        assert done.code == 3
        assert "lbq convert" in done.error
        assert "lbq run --bits 4" in done.error


def test_an_artifact_with_bits(kept_artifact: Path, lbq: Lbq) -> None:
    done = lbq("run", kept_artifact, *SHORT, "--bits", "4")
    assert (done.code, "an artifact, quantized already" in done.error) == (2, True)


@pytest.mark.parametrize("option", ["--gs=64", "--lm-head=4", "--keep=o_proj", "--set=o_proj=8"])
def test_what_goes_with_bits(kept_artifact: Path, lbq: Lbq, option: str) -> None:
    done = lbq("run", kept_artifact, *SHORT, option)
    assert (done.code, "go with --bits" in done.error) == (2, True)
    with pytest.raises(UsageError, match="go with bits"):
        package.load(kept_artifact, keep=["o_proj"])


def test_what_is_wrong_is_said_before_the_work(
    checkpoints: Mapping[str, Path], lbq: Lbq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lbq.runtime.ready.bind", lambda *_: pytest.fail("bound"))
    for options in (("--bits", "5"), ("--bits", "4", "--set", "nothing=8"), ("--bits", "4", "--top-p", "7")):
        assert lbq("run", checkpoints["llama"], *SHORT, *options).code == 2


def test_a_weight_without_a_code(make_checkpoint: Callable[..., Path], lbq: Lbq) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][5, 7] = float("nan")

    folder = make_checkpoint(edit=spoil)
    done = lbq("run", folder, *SHORT, "--bits", "4", "--gs", "32")
    assert (done.code, f"{name} has nan at [5, 7]" in done.error) == (3, True)
    with pytest.raises(DataError, match="nan"):
        package.load(folder, bits=4, group=32, device="cpu")
