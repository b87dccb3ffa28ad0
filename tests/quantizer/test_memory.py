"""Peak memory: of a conversion a few times the largest tensor, of quantising at load that on top of the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hub_stub import Hub

from lbq.formats.safetensors_writer import ShardWriter, TensorPlan, index_json, plan_shards, shard_names
from lbq.quantizer.families import read_spec

PEAK = """
import re, sys
from pathlib import Path
import torch
from lbq.quantizer.convert import write_artifact
from lbq.quantizer.prepare import prepare
from lbq.quantizer.on_load import QuantizedOnLoad
from lbq.quantizer.request import make_request
from lbq.quantizer.source import resolve
from lbq.runtime.binding import bind
from lbq.runtime.devices import CpuDevice
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
"""
CONVERT = """
prepared = prepare(resolve(sys.argv[1]), make_request(4, 128))
done = write_artifact(prepared, Path(sys.argv[2]), device="cpu")
print(before, peak(), done.manifest.summary.weights)
"""
LOAD = """
prepared = prepare(resolve(sys.argv[1]), make_request(4, 128))
bound = bind(QuantizedOnLoad(prepared, torch.device("cpu")), CpuDevice(exact=False))
print(before, peak(), bound.resident_bytes)
"""
STREAM = """
import huggingface_hub, lbq.hub.client
from lbq.conversion import convert
before = peak()
done = convert(sys.argv[1], sys.argv[2], device="cpu", stream=True)
print(before, peak(), done.manifest.summary.weights)
"""
TUNE = """
import lbq.quantizer.autoround.run
from lbq.quantizer.autoround.settings import make_tuning
from lbq.quantizer.quiet import quiet
with quiet():
    import auto_round, transformers.models.llama.modeling_llama
before = peak()
tuning = make_tuning("autoround", iters=1, nsamples=8, seqlen=64, batch_size=4, calib=sys.argv[3])
prepared = prepare(resolve(sys.argv[1]), make_request(4, 128, tuning=tuning))
write_artifact(prepared, Path(sys.argv[2]), device="cpu")
print(before, peak(), prepared.peak_bytes)
"""


def synthetic(folder: Path, *, hidden: int, width: int, layers: int, vocab: int, shard: int = 2_000_000_000) -> int:
    """A Llama of these sizes, its weights the same random block again and again. Returns the bytes of its tensors."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 512,
        "vocab_size": vocab,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    spec = read_spec(folder).spec
    shapes = {f"{p.name}.weight": (p.out_features, p.in_features) for p in spec.projections()}
    shapes |= {f"{name}.weight": (size,) for name, size in spec.norms()} | {f"{spec.embedding}.weight": (vocab, hidden)}
    plans = [TensorPlan(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    block = torch.randn(max(torch.Size(plan.shape).numel() for plan in plans)).bfloat16()
    shards = plan_shards(plans, shard)
    for file, part in zip(shard_names(len(shards)), shards, strict=True):
        with ShardWriter(folder / file, part) as writer:
            for plan in part:
                writer.write(plan.name, block[: torch.Size(plan.shape).numel()].view(plan.shape))
            writer.finish()
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_bytes(index_json(shards))
    return sum(plan.nbytes for plan in plans)


def measured(program: str, *arguments: Path | str) -> tuple[int, int, int]:
    """Peak resident bytes of a process before it begins and at its end, and the program's own number."""
    command = [sys.executable, "-c", PEAK + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after, number = map(int, done.stdout.split())
    print(before, after, number)
    assert number > 0
    return before, after, number


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    nbytes = synthetic(tmp_path / "source", hidden=1024, width=2048, layers=10, vocab=2048)
    assert nbytes > 180_000_000
    before, after, _ = measured(CONVERT, tmp_path / "source", tmp_path / "out")
    assert after - before < 120_000_000
    before, after, resident = measured(LOAD, tmp_path / "source")
    assert resident < 0.35 * nbytes
    assert after - before < resident + 120_000_000


def test_memory_of_a_conversion_while_downloading(tmp_path: Path, hub: Hub) -> None:
    nbytes = synthetic(tmp_path / "source", hidden=1024, width=2048, layers=10, vocab=2048, shard=50_000_000)
    hub.add_folder("user/model", tmp_path / "source")
    before, after, _ = measured(STREAM, "user/model", tmp_path / "out")
    assert nbytes > 180_000_000
    assert after - before < 150_000_000


@pytest.mark.slow
def test_eight_gigabytes(tmp_path: Path) -> None:
    nbytes = synthetic(tmp_path / "source", hidden=4096, width=14336, layers=18, vocab=32000)
    assert nbytes > 8_000_000_000
    _, after, _ = measured(CONVERT, tmp_path / "source", tmp_path / "out")
    assert after < 1_000_000_000
    _, after, resident = measured(LOAD, tmp_path / "source")
    assert after < resident + 1_000_000_000
    for folder in ("source", "out"):  # pytest keeps the folders of its last runs
        for path in (tmp_path / folder).iterdir():
            path.unlink()


@pytest.mark.slow
def test_tuning_holds_one_block(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    """Of 2.1 GB of weights, which would be 4.3 GB in float32."""
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    nbytes = synthetic(source, hidden=2048, width=8192, layers=16, vocab=2048)
    (source / "tokenizer.json").write_bytes((checkpoints["llama"] / "tokenizer.json").read_bytes())
    text.write_text("all is well " * 1000)
    command = [sys.executable, "-c", PEAK + TUNE, *map(str, (source, out, text))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after, estimate = map(int, done.stdout.split())
    print(nbytes, before, after, estimate)
    assert nbytes > 1_900_000_000
    assert after - before < 1.1 * estimate < 3_000_000_000
    for path in (*source.iterdir(), *out.iterdir()):  # pytest keeps the folders of its last runs
        path.unlink()
