"""`lbq plan` and `lbq convert --dry-run`: what they say is what then happens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lbq.formats.artifact import open_artifact
from lbq.formats.manifest import read_manifest
from lbq.quantizer import timing
from lbq.runtime import load

pytestmark = pytest.mark.usefixtures("one_thread")

Lbq = Callable[..., Any]
OPTIONS = ("--gs", "64", "--set", "down_proj=8", "--keep", "o_proj")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "WRITE_BYTES", 1 << 20)
    monkeypatch.setattr(timing, "CPU_BLOCK", 1 << 14)


def planned(lbq: Lbq, *arguments: object) -> Any:
    done = lbq(*arguments, "--json")
    assert done.code == 0, done
    return json.loads(done.out)


@pytest.mark.parametrize("command", [("plan",), ("convert", "--dry-run")])
def test_what_will_be_written(
    command: tuple[str, ...], checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = lbq(*command, checkpoints["qwen3"], *OPTIONS, "--out", out, "--json")
    assert (done.code, os.listdir(tmp_path)) == (0, [])
    plan = json.loads(done.out)
    assert lbq("convert", checkpoints["qwen3"], *OPTIONS, "--out", out).code == 0
    manifest = read_manifest(out)
    assert done.err.splitlines() == [f"note: {note}" for note in manifest.notes]
    written = json.loads((out / "lbq.json").read_text())
    assert plan["path"] == str(out)
    assert (plan["quantized"], plan["dense"]) == (written["quantized"], written["dense"])
    assert plan["bits_per_weight"] == manifest.summary.bits_per_weight
    assert sum(row["bytes"] for row in plan["tensors"]) == plan["bytes"]
    assert sum(row["count"] for row in plan["tensors"]) == len(plan["quantized"]) + len(plan["dense"])
    files = [entry.size for name, entry in manifest.files.items() if name.endswith(".safetensors")]
    assert 0 < sum(files) - plan["bytes"] < 130 * (len(plan["quantized"]) * 3 + len(plan["dense"]) + 1)
    assert plan["peak_bytes"] > 0
    assert plan["disk_free"] > 0
    assert plan["timing"]["quantizing"] > 0
    assert plan["timing"]["reading"] > 0
    assert plan["timing"]["writing"] > 0


def test_what_tuning_takes(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path) -> None:
    """No text is read for it, and work costs disk, memory and time."""
    source, out = checkpoints["llama"], tmp_path / "out"
    rounded = planned(lbq, "plan", source, "--gs", "32", "--out", out)
    options = ("--gs", "32", "--method", "autoround", "--calib", tmp_path / "missing.txt", "--seqlen", 64)
    tuned = planned(lbq, "convert", "--dry-run", source, *options, "--nsamples", 10, "--out", out)
    assert (rounded["method"], tuned["method"]) == ("rtn", "autoround")
    assert tuned["bytes"] == rounded["bytes"] == rounded["disk_bytes"]
    states = 3 * 10 * 64 * 64 * 2
    assert tuned["disk_bytes"] - tuned["bytes"] > states
    assert tuned["timing"]["quantizing"] > rounded["timing"]["quantizing"]
    wide = ("--seqlen", 128, "--batch-size", 128)
    assert planned(lbq, "plan", source, *options, *wide)["peak_bytes"] > tuned["peak_bytes"]


@pytest.mark.parametrize("family", ["smollm2", "qwen2"])
def test_what_will_run(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path, family: str) -> None:
    plan = planned(lbq, "plan", checkpoints[family], *OPTIONS, "--device", "cpu", "--context", "100")
    lbq("convert", checkpoints[family], *OPTIONS, "--out", tmp_path / "out")
    with load(tmp_path / "out", device="cpu") as model:
        uses = [(use.count, use.units, use.kernel, use.fallback) for use in model.kernels()]
        resident = model.resident_bytes
    assert plan["device"] == "cpu"
    assert [(row["count"], row["units"], row["kernel"], row["fallback"]) for row in plan["layers"]] == uses
    assert plan["cpu"]["weights"] == resident
    assert plan["cpu"]["context"] == 100
    heads, dim, layers = 2, 16, 2
    assert plan["cpu"]["cache"] == 100 * 2 * heads * dim * layers * 4
    assert plan["gpu"]["cache"] == 100 * 2 * heads * dim * layers * 2
    with open_artifact(tmp_path / "out") as artifact:
        embedding = artifact.dense(f"{artifact.spec.embedding}.weight").nbytes
        packed = sum(artifact.packed(name).nbytes for name in artifact.manifest.quantized)
    assert plan["gpu"]["weights"] > packed + embedding


def test_other_tools(checkpoints: Mapping[str, Path], lbq: Lbq) -> None:
    rows = {row["units"]: row for row in planned(lbq, "plan", checkpoints["llama"], *OPTIONS)["layers"]}
    down = rows["model.layers.*.mlp.down_proj"]
    assert (down["n"], down["k"], down["bits"], down["group"]) == (64, 96, 8, None)
    assert down["vllm"] == {"runs": True, "fast": False, "text": "Marlin, padded (Hopper: Humming)"}
    assert not down["sglang"]["runs"]
    kept = rows["model.layers.*.self_attn.o_proj"]
    assert (kept["bits"], kept["vllm"], kept["sglang"]) == (16, None, None)


def test_the_text(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = lbq("plan", checkpoints["llama"], *OPTIONS, "--device", "cpu")
    assert (done.code, os.listdir()) == (0, [])
    lines = done.out.splitlines()
    assert lines[0].strip() == "llama-int4-g64 (not written)"
    rows = {line.split()[0]: line.split() for line in lines[2 : lines.index("")]}
    assert rows["model.layers.*.mlp.down_proj"][1:5] == ["64×96", "INT8", "row", "2"]
    assert rows["model.layers.*.mlp.gate_proj"][1:5] == ["96×64", "INT4", "row", "2"]
    assert rows["model.layers.*.self_attn.o_proj.weight"][1:4] == ["64×64", "BF16", "2"]
    assert "   2 × model.layers.*.mlp.{gate_proj,up_proj}: 192×64 INT4, one scale a row" in lines
    size, converts, cpu, gpu = lines[-4:]
    assert size.startswith("size ")
    assert " here (quantizing " in converts
    assert "runs      with texts of up to 128 tokens, on a CPU in " in cpu
    assert "on a GPU in " in gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(checkpoints: Mapping[str, Path], lbq: Lbq) -> None:
    plan = planned(lbq, "plan", checkpoints["llama"], "--gs", "32", "--device", "cuda")
    assert (plan["device"], plan["timing"], plan["gpu"]["free"]) == ("cuda", None, None)
    assert all(row["kernel"].startswith("Triton") for row in plan["layers"])
    assert "time not estimated" in lbq("plan", checkpoints["llama"], "--gs", "32", "--device", "cuda").out


def test_what_is_refused(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path) -> None:
    llama = checkpoints["llama"]
    assert lbq("plan", llama, "--gs", "64", "--strict").code == 2
    assert "made for 1 to 128 tokens" in lbq("plan", llama, "--gs", "32", "--context", "129").error
    assert lbq("plan", tmp_path / "nothing").code == 4
    assert lbq("plan", tmp_path).code == 3
