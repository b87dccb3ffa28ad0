"""Peak memory of a conversion: a few times the largest tensor, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lbq.formats.safetensors_writer import ShardWriter, TensorPlan, index_json, plan_shards, shard_names
from lbq.quantizer.families import read_spec

PROGRAM = """
import re, sys
import lbq.quantizer.convert as conversion
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
done = conversion.convert(sys.argv[1], sys.argv[2], bits=4, group=128, device="cpu")
print(before, peak(), done.manifest.summary.weights)
"""


def synthetic(folder: Path, *, hidden: int, width: int, layers: int, vocab: int) -> int:
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
    shards = plan_shards(plans, 2_000_000_000)
    for file, shard in zip(shard_names(len(shards)), shards, strict=True):
        with ShardWriter(folder / file, shard) as writer:
            for plan in shard:
                writer.write(plan.name, block[: torch.Size(plan.shape).numel()].view(plan.shape))
            writer.finish()
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_bytes(index_json(shards))
    return sum(plan.nbytes for plan in plans)


def convert(source: Path, target: Path) -> tuple[int, int]:
    """Peak resident bytes of a process that converts: before it begins, and at its end."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, source, target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after, weights = map(int, done.stdout.split())
    assert weights > 0
    return before, after


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    nbytes = synthetic(tmp_path / "source", hidden=1024, width=2048, layers=10, vocab=2048)
    before, after = convert(tmp_path / "source", tmp_path / "out")
    print(nbytes, before, after)
    assert nbytes > 180_000_000
    assert after - before < 120_000_000


@pytest.mark.slow
def test_eight_gigabytes(tmp_path: Path) -> None:
    nbytes = synthetic(tmp_path / "source", hidden=4096, width=14336, layers=18, vocab=32000)
    before, after = convert(tmp_path / "source", tmp_path / "out")
    print(nbytes, before, after)
    assert nbytes > 8_000_000_000
    assert after < 2_000_000_000
    for folder in ("source", "out"):  # pytest keeps the folders of its last runs
        for path in (tmp_path / folder).iterdir():
            path.unlink()
