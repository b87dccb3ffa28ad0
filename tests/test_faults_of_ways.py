"""Bad input and faults on every way to an artifact that is not plain round to nearest of a folder.

Each ends as it does on that one: one line, an exit code, the source untouched, nothing new beside it.
"""

from __future__ import annotations

import errno
import gc
import os
import pickle
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stub import Hub

from lbq.formats import json_file
from lbq.formats.artifact import open_artifact
from lbq.formats.manifest import read_manifest
from lbq.formats.safetensors_file import SINGLE, open_checkpoint
from lbq.formats.staging import StagedFolder
from lbq.quantizer.quiet import quiet

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")

Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj.weight"
NAME = "user/model"
WAYS = {
    "autoround": "--method autoround --iters 1 --nsamples 2 --seqlen 16 --batch-size 2 --calib text.txt",
    "target": "--target-bpw 6 --report-tokens 256 --calib text.txt",
    "stream": "--stream --max-shard-size 40KB",
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Way:
    """Converts into ``place/out`` by one way."""

    def __init__(self, name: str, place: Path, hub: Hub, lbq: Callable[..., Any]) -> None:
        self.name, self.place, self.target = name, place, place / "out"
        self._hub, self._lbq = hub, lbq
        self._there: dict[str, bytes] = {}  # on the Hub

    def command(self, source: Path, *options: object) -> list[str]:
        """Of a checkpoint, which goes to the Hub where the way begins there."""
        if self.name == "stream" and self._there != content(source):
            self._hub.add_folder(NAME, source)
            self._there = content(source)
        model = NAME if self.name == "stream" else source
        return [str(part) for part in ("convert", model, "--gs", "32", *WAYS[self.name].split(), *options)]

    def __call__(self, source: Path, *options: object) -> Any:
        return self._lbq(*self.command(source, "--out", self.target, *options))

    def refuses(self, source: Path, code: int, *options: object) -> str:
        """The error; nothing may change."""
        before, beside = content(source), sorted(os.listdir(self.place))
        done = self(source, *options)
        assert (done.code, done.out) == (code, ""), done
        assert content(source) == before
        assert sorted(os.listdir(self.place)) == beside
        return str(done.err).splitlines()[-1]


@pytest.fixture(scope="module", autouse=True)
def light() -> Iterator[None]:
    """auto-round collects garbage several times a block; not among all that its import has made."""
    with quiet():
        import auto_round  # noqa: F401
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=WAYS)
def way(
    request: pytest.FixtureRequest, tmp_path: Path, hub: Hub, lbq: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Way:
    place = tmp_path / "place"
    place.mkdir()
    (place / "text.txt").write_text("".join(random.Random(3).choices("the quick brown fox", k=4000)))
    monkeypatch.chdir(place)
    monkeypatch.setattr("lbq.evaluation.study.TOKENS", 256)
    return Way(request.param, place, hub, lbq)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles(make_checkpoint: Make, way: Way, tmp_path: Path, hub: Hub) -> None:
    source = make_checkpoint()
    (source / SINGLE).unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert "pickled weights" in way.refuses(source, 3)
    assert not (tmp_path / "canary").exists()
    assert "pytorch_model.bin" not in hub.fetched()


def test_remote_code(make_checkpoint: Make, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused or ignored, and nobody is asked for it."""
    source = make_checkpoint(_attn_implementation_internal="someone/evil-kernels", _attn_implementation="flex")
    if way.name != "stream":
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    done = way(source)
    assert done.code == 0, done
    assert "unknown keys are ignored: _attn_implementation, _attn_implementation_internal" in done.err
    config = json_file.read(source / "config.json", dict[str, Any])
    (source / "evil.py").write_text("raise SystemExit('imported')")
    for key, value in (("auto_map", {"AutoModelForCausalLM": "evil.Model"}), ("trust_remote_code", True)):
        (source / "config.json").write_bytes(json_file.encode(config | {key: value}))
        assert key in way.refuses(source, 3, "--overwrite")


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_weights_that_are_no_numbers(value: str, make_checkpoint: Make, way: Way) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[UP][5, 7] = float(value)

    error = way.refuses(make_checkpoint(edit=spoil), 3)
    assert f"{UP} has {value} at [5, 7]" in error
    assert ".out" not in "".join(os.listdir(way.place))


def test_numbers_at_the_edge(make_checkpoint: Make, way: Way) -> None:
    """Zeros, constants, one sign, subnormals, scales of 5e5/7 and 1e-7/7: finite, and zeros stay."""

    def edit(tensors: Tensors) -> None:
        w = tensors[UP] = tensors[UP].float()
        w[0], w[1], w[2] = 0.0, 0.25, w[2].abs()
        w[3], w[4], w[5] = w[3] * 1e-40, w[4].sign() * 5e5, w[5].sign() * 1e-7

    source = make_checkpoint(edit=edit)
    done = way(source)
    assert done.code == 0, done
    with open_checkpoint(source) as weights, open_artifact(way.target) as made:
        w, packed = weights.tensor(UP).double(), made.packed(UP.removesuffix(".weight"))
        q = packed.dequantize().double()
    assert bool(q.isfinite().all())
    assert bool(packed.scales[3:6].isfinite().all())
    assert torch.equal(q[0], w[0])
    assert bool((q[4:6].abs().amax(1) > w[4:6].abs().amax(1) / 2).all())
    assert bool((q[4:6].abs().amax(1) < w[4:6].abs().amax(1) * 1.5).all())


def test_odd_widths(make_checkpoint: Make, way: Way) -> None:
    """By the documented rule, which is said; or refused."""
    source = make_checkpoint(intermediate_size=67)
    error = way.refuses(source, 2, "--strict")
    assert "refused under --strict" in error
    done = way(source)
    assert done.code == 0, done
    manifest = read_manifest(way.target)
    entry = manifest.quantized["model.layers.1.mlp.down_proj"]
    assert (entry.k, entry.group) == (67, 67)
    assert [line.removeprefix("note: ") for line in done.err.splitlines() if line.startswith("note: ")] == list(
        manifest.notes
    )


def test_a_head_beside_a_tied_embedding(make_checkpoint: Make, way: Way) -> None:
    def both(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    source = make_checkpoint("smollm2", edit=both)
    done = way(source, "--lm-head", 8)
    assert done.code == 0, done
    assert "the checkpoint saves another: the saved one is used" in done.err
    with open_checkpoint(source) as weights, open_artifact(way.target) as made:
        head, packed = weights.tensor("lm_head.weight").float(), made.packed("lm_head").dequantize()
    assert float((packed - head).norm() / head.norm()) < 0.01


STOP = """
import os, signal, sys, time
from lbq import cli
from lbq.evaluation import study
from lbq.quantizer.measure import Meter
def stop(*_, **__):
    os.kill(os.getpid(), signal.{number})
    time.sleep(60)
Meter.report = stop
study.measure = stop
cli.main()
"""


@pytest.mark.parametrize("way", ["target", "stream"], indirect=True)  # autoround: test_autoround_resume.py
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals(number: str, code: int, make_checkpoint: Make, way: Way) -> None:
    """While tensors are written, or units measured. What is kept is said, and the same command goes on."""
    source = make_checkpoint()
    command = way.command(source, "--out", "out", "--device", "cpu")
    program = [sys.executable, "-c", STOP.format(number=number), *command]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    kept = [".out.stream"] if way.name == "stream" else []
    assert ("the same command goes on with it" in done.stderr) == bool(kept)
    assert sorted(os.listdir(way.place)) == [*kept, "text.txt"]
    assert way(source).code == 0
    assert sorted(os.listdir(way.place)) == ["out", "text.txt"]


@pytest.mark.parametrize("way", ["target", "stream"], indirect=True)  # autoround: test_autoround_resume.py
def test_a_disk_that_fills_up(make_checkpoint: Make, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """At writes from the first to the last; a rerun goes on or begins anew, to the same bytes."""
    source = make_checkpoint()
    pwrite, left = os.pwrite, 10_000

    def filling(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", filling)
    assert way(source).code == 0
    writes, whole = 10_000 - left, content(way.target)
    for room in (0, writes // 3, writes // 2, writes - 1):
        for path in way.target.iterdir():
            path.unlink()
        left = room
        done = way(source)
        assert done.code == 4, done
        assert "No space left on device" in done.err
        assert "bytes needed" in done.err
        assert list(way.target.iterdir()) == []
        left = 10_000
        assert way(source).code == 0
        assert content(way.target) == whole
        assert sorted(os.listdir(way.place)) == ["out", "text.txt"]


def test_outputs(make_checkpoint: Make, kept_artifact: Path, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be an output is refused before any weight is looked at."""
    source = make_checkpoint(edit=lambda tensors: tensors[UP].fill_(float("nan")))  # work would end in exit code 3
    with StagedFolder(way.target):
        assert "another lbq is writing it" in way.refuses(source, 5)
    way.target.mkdir()
    (way.target / "thesis.txt").touch()
    assert "not empty and not an lbq artifact" in way.refuses(source, 4)
    (way.target / "thesis.txt").unlink()
    for path in kept_artifact.iterdir():
        (way.target / path.name).write_bytes(path.read_bytes())
    assert "exists; choose another output, or --overwrite" in way.refuses(source, 4)
    assert "has nan" in way.refuses(source, 3, "--overwrite")
    assert content(way.target) == content(kept_artifact)
    way.target = way.place / "new"
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert "is not writable" in way.refuses(source, 4)
