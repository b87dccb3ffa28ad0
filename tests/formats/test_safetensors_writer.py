"""The streaming writer: the safetensors package's bytes in any order, and no file of that name before the end."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lbq.formats import disk
from lbq.formats.errors import StorageError
from lbq.formats.safetensors_file import DTYPES, SafetensorsFile, open_checkpoint
from lbq.formats.safetensors_writer import ShardWriter, TensorPlan, index_json, plan_shards, shard_names


def plan_of(tensors: dict[str, torch.Tensor]) -> list[TensorPlan]:
    return [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer.{i}.{name}": torch.randint(0, 100, (5, 3), generator=generator).to(dtype)
        for i in range(2)
        for name, dtype in DTYPES.items()
    }
    return tensors | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "ä": torch.ones(3)}


def write(path: Path, tensors: dict[str, torch.Tensor], order: list[str]) -> disk.FileEntry:
    with ShardWriter(path, plan_of(tensors)) as writer:
        for name in order:
            writer.write(name, tensors[name])
        return writer.finish()


def test_bytes_are_the_packages_in_any_order(tmp_path: Path) -> None:
    tensors = some_tensors()
    golden = safetensors.torch.save(tensors, {"format": "pt"})
    names = list(tensors)
    for seed in range(3):
        random.Random(seed).shuffle(names)
        path = tmp_path / f"{seed}.safetensors"
        written = write(path, {name: tensors[name] for name in sorted(names)}, names)
        assert path.read_bytes() == golden
        assert written == disk.FileEntry(len(golden), hashlib.sha256(golden).hexdigest())
    assert sorted(os.listdir(tmp_path)) == ["0.safetensors", "1.safetensors", "2.safetensors"]


def test_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    write(path, {"b": torch.tensor([1, 2], dtype=torch.int16), "a": torch.tensor([1.0])}, ["b", "a"])
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"I16","shape":[2],"data_offsets":[4,8]}}      '
    )
    assert len(header) == 144
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f\1\0\2\0"


def test_strides_blocks_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbq.formats.safetensors_writer.BLOCK", 1000)
    monkeypatch.setattr(disk, "BLOCK", 700)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 2)], at))
    tensors = {
        "transposed": torch.randn(70, 90).T,
        "strided": torch.randn(100, 100)[::3, 1::2],
        "expanded": torch.randn(1, 30).expand(20, 30),
        "gradient": torch.randn(40, 40, requires_grad=True),
    }
    path = tmp_path / "m.safetensors"
    write(path, tensors, list(tensors))
    for name, tensor in safetensors.torch.load_file(path).items():
        assert torch.equal(tensor, tensors[name])


def test_no_name_before_the_end_and_plans_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    a = torch.ones(3)
    with ShardWriter(path, plan_of({"a": a, "b": a})) as writer:
        writer.write("a", a)
        assert not path.exists()
        for name, tensor in [("a", a), ("c", a), ("b", a.to(torch.float64))]:
            with pytest.raises(AssertionError, match=name):
                writer.write(name, tensor)
    with (
        ShardWriter(path, plan_of({"a": a, "b": a})) as writer,
        pytest.raises(AssertionError, match="never written: 'a'"),
    ):
        writer.finish()
    with pytest.raises(AssertionError, match="a is planned twice"):
        ShardWriter(path, [*plan_of({"a": a}), *plan_of({"a": a})])
    assert not path.exists()


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_says_what_is_needed(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the kernel takes a part of the data and then refuses."""
    path = tmp_path / "m.safetensors"
    tensors = {"a": torch.ones(1 << 16)}
    size = len(safetensors.torch.save(tensors, {"format": "pt"}))
    for limit in (50, 5000):
        with (
            largest_file(limit),
            pytest.raises(StorageError, match=rf"{path}.*\({size} bytes needed, \d+ bytes free\)"),
        ):
            write(path, tensors, ["a"])
    assert not path.exists()
    assert write(path, tensors, ["a"]).size == size  # over what the failed ones left


def test_shards(tmp_path: Path) -> None:
    sizes = [3, 5, 2, 20, 1, 9, 0, 1]
    tensors = {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    shards = plan_shards(plan_of(tensors), 10)
    assert [[plan.nbytes for plan in shard] for shard in shards] == [[3, 5, 2], [20], [1, 9, 0], [1]]
    assert plan_shards([], 10) == []
    names = shard_names(4)
    assert names[1] == "model-00002-of-00004.safetensors"
    assert shard_names(1) == ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write(tmp_path / name, {plan.name: tensors[plan.name] for plan in shard}, [plan.name for plan in shard])
    index = index_json(shards)
    assert index == index_json(shards)
    assert json.loads(index)["metadata"] == {"total_size": sum(sizes)}
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == set(tensors)
        assert list(checkpoint.files) == names
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


def test_data_are_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(3)}
    write(tmp_path / "m", tensors, ["a", "b", "c"])
    with SafetensorsFile(tmp_path / "m") as file:
        assert all(info.start % info.dtype.itemsize == 0 for info in file.tensors.values())


@pytest.mark.gpu
def test_from_the_gpu(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300, 200).T, "b": torch.randn(17).to(torch.bfloat16)}
    write(tmp_path / "m", {name: tensor.cuda() for name, tensor in tensors.items()}, ["b", "a"])
    assert all(torch.equal(t, tensors[name]) for name, t in safetensors.torch.load_file(tmp_path / "m").items())
