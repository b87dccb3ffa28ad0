"""Imports and exports that are killed, that find no room, and whose source is on the Hub."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_stub import Hub

from lbq.conversion import convert
from lbq.formats.errors import StorageError
from lbq.quantizer.export import export
from lbq.quantizer.foreign.importing import import_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
HARNESS = Path(__file__).parents[1] / "convert_harness.py"

Lbq = Callable[..., Any]


@pytest.fixture(scope="module")
def made(write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of one layer."""
    root = tmp_path_factory.mktemp("made")
    source = write_checkpoint(root / "source", num_hidden_layers=1)
    return convert(source, root / "artifact", group=32, max_shard_bytes=40_000, device="cpu").path


@pytest.fixture(scope="module")
def gptq(made: Path) -> Path:
    """The same weights as a GPTQ checkpoint."""
    return export(made, "gptq", made.parent / "gptq").path


@pytest.mark.parametrize("kind", ["import", "export"])
def test_killed_anywhere(made: Path, gptq: Path, tmp_path: Path, kind: str) -> None:
    """The output is whole or absent; a rerun gives the same bytes and leaves nothing else."""
    source = {"import": gptq, "export": made}[kind]
    done = subprocess.run(
        [sys.executable, HARNESS, source, tmp_path, kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


@pytest.mark.parametrize("to", ["vllm", "gptq", "gguf"])
def test_a_disk_without_room(made: Path, gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    monkeypatch.setattr("lbq.formats.disk.free_bytes", lambda _: 1000)
    for work in (lambda: import_checkpoint(gptq, tmp_path / "out"), lambda: export(made, to, tmp_path / "out")):
        with pytest.raises(StorageError, match=r"disk too full: \d+ bytes needed, 1000 bytes free"):
            work()
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up(made: Path, gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any write of an import; somewhere in a GGUF file, which its own package writes."""
    from gguf import GGUFWriter

    pwrite, left = os.pwrite, 0

    def filling(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        return pwrite(descriptor, data, offset)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        for room in range(0, 30, 3):
            left = room
            with pytest.raises(StorageError, match="No space left on device"):
                import_checkpoint(gptq, tmp_path / "out", max_shard_bytes=40_000)
            assert os.listdir(tmp_path) == []
    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export(made, "gguf", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_on_the_hub(
    hub: Hub, gptq: Path, lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id and revision, of which the manifest tells."""
    hub.add("user/model-gptq", {path.name: path.read_bytes() for path in gptq.iterdir()})
    monkeypatch.chdir(tmp_path)
    done = lbq("import", "user/model-gptq")
    assert done.code == 0, done.err
    local = import_checkpoint(gptq, tmp_path / "local")
    found = tmp_path / "model-gptq-lbq"
    assert (found / "model.safetensors").read_bytes() == (local.path / "model.safetensors").read_bytes()
    assert "user/model-gptq" in lbq("inspect", found).out
    assert lbq("import", "user/model-gptq@nowhere", "--out", tmp_path / "x").code == 6
    assert not (tmp_path / "x").exists()
