"""Folders of safetensors files: index and shards must agree, and nothing outside the folder is opened."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lbq.formats.disk import check_plain_name, listed, shown
from lbq.formats.errors import DataError, StorageError
from lbq.formats.safetensors_file import open_checkpoint

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(folder: Path, weight_map: Any, **more: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 8.0}, "weight_map": weight_map, **more}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with tensors a and b."""
    save_file({"a": torch.ones(2)}, tmp_path / ONE)
    save_file({"b": torch.zeros(3)}, tmp_path / TWO)
    write_index(tmp_path, {"a": ONE, "b": TWO})
    return tmp_path


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_shards_and_single_file(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.names() == ("a", "b")
        assert "a" in checkpoint
        assert "c" not in checkpoint
        assert checkpoint.info("b").shape == (3,)
        assert checkpoint.tensor("a").tolist() == [1, 1]
        checkpoint.release("a")
        assert list(checkpoint.files) == [ONE, TWO]
        with pytest.raises(DataError, match="'c' is missing"):
            checkpoint.tensor("c")
        kept = checkpoint.tensor("b")
    assert kept.tolist() == [0, 0, 0]
    save_file({"c": torch.ones(1)}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:  # as transformers does: the single file goes first
        assert checkpoint.names() == ("c",)


def test_symlinked_shards_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The Hub's cache is made of links."""
    links = tmp_path_factory.mktemp("links")
    for name in os.listdir(folder):
        (links / name).symlink_to(folder / name)
    with open_checkpoint(links) as checkpoint:
        assert checkpoint.tensor("a").tolist() == [1, 1]


BAD_NAMES = [
    "../x.safetensors", "/abs.safetensors", "C:x", "C:\\x", "..\\x", "a/b", "..", ".", "", "a\0b", "a\nb", "é" * 200,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_nothing_outside_the_folder_is_opened(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(folder, {"a": ONE, "b": name})
    opened: list[object] = []
    real_open = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *args, **kwargs: opened.append(path) or real_open(path, *args, **kwargs)
    )
    refused(folder, INDEX, "not a plain file name")
    assert opened == []  # not even the good shard
    with pytest.raises(DataError, match="manifest"):
        check_plain_name(name, "manifest")


def test_missing_extra_and_doubled_tensors_are_listed(folder: Path) -> None:
    write_index(folder, {"a": ONE, "b": TWO, "c": ONE, "d": TWO})
    refused(folder, "missing from their shards: 'c', 'd'")
    write_index(folder, {"a": ONE, "b": ONE})
    refused(folder, "missing from their shards: 'b'")
    write_index(folder, {"a": ONE, "b": TWO, "c": "model-3.safetensors"})
    refused(folder, "missing files: 'model-3.safetensors'")
    write_index(folder, {"a": ONE, "b": TWO})
    save_file({"b": torch.zeros(3), "x": torch.zeros(3)}, folder / TWO)
    refused(folder, "not in the index: 'x'")
    save_file({"b": torch.zeros(3), "a": torch.zeros(3)}, folder / TWO)
    refused(folder, "more than one shard: 'a'")


def test_lists_are_bounded(folder: Path) -> None:
    write_index(folder, {"a": ONE, "b": TWO} | {f"t{i}": ONE for i in range(1000)})
    refused(folder, "'t0', 't1', 't2', 't3', 't4' and 995 more")
    assert len(listed(["x" * 10_000] * 10_000)) < 1000
    assert shown("a\n\x1b[31m") == "'a\\n\\x1b[31m'"


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"{}", b'{"weight_map":{}', b'{"weight_map":[]}', b'{"weight_map":{"a":1}}', b'{"weight_map":null}',
        b'{"weight_map":' + b"[" * 100_000, b'{"metadata":' + b"[" * 100_000, b'{"weight_map":{"\xff":"x"}}',
        b'{"weight_map":{"a":"m","a":"m"}}',
    ],
    ids=lambda text: repr(text[:30]),
)  # fmt: skip
def test_broken_index(folder: Path, text: bytes) -> None:
    (folder / INDEX).write_bytes(text)
    refused(folder, INDEX)


@pytest.mark.parametrize("kept", [0, 0.5, 0.9999])
def test_cut_shard_is_named(folder: Path, kept: float) -> None:
    content = (folder / TWO).read_bytes()
    (folder / TWO).write_bytes(content[: int(len(content) * kept)])
    refused(folder, TWO)


class Canary:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("canary",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Canary()))
    refused(tmp_path, name, "safetensors")
    assert os.listdir(tmp_path) == [name]


def test_missing_folders_and_weights(tmp_path: Path) -> None:
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(StorageError, match=str(path)):
            open_checkpoint(path)
