"""Peers of ``lbq bench``: what is not there, what fails, and one that runs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbq.peers import run
from lbq.peers.child import answer
from lbq.peers.contenders import CONTENDERS
from lbq.peers.models import config_of
from lbq.peers.run import run_peers
from lbq.runtime.bench.decode import Workload
from lbq.runtime.bench.shapes import SHAPES

SPEC, CPU = SHAPES["tiny"].spec(), torch.device("cpu")
LOAD = Workload(prompt=5, new=4, rounds=2)
EAGER = "transformers BF16"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``only(name…)``: no other contender."""
    return lambda *names: monkeypatch.setattr(run, "CONTENDERS", {name: CONTENDERS[name] for name in names})


@pytest.fixture
def llama_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """``llama_bench(python)`` puts a program of that name on the PATH."""

    def make(text: str) -> None:
        program = tmp_path / "bin" / "llama-bench"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable}\n{text}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return make


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    heard: list[str] = []
    found = {peer.name: peer.failure for peer in run_peers(SPEC, LOAD, CPU, on_peer=heard.append)}
    assert list(found) == heard == [*CONTENDERS, "llama-bench"]
    assert found[EAGER] == "transformers not installed"
    assert found["gemlite INT4 g64, compiled"] == "gemlite and hqq not installed"
    assert found["llama-bench"] == "not on the PATH"
    monkeypatch.setattr(run, "find_spec", lambda _: object())
    monkeypatch.setattr(run, "CONTENDERS", {name: c for name, c in CONTENDERS.items() if c.needs_gpu})
    assert {peer.failure for peer in run_peers(SPEC, LOAD, CPU)} == {"needs a GPU", "not on the PATH"}


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "smollm2-135m", "tiny"])
def test_the_same_shape(shape: str) -> None:
    from transformers import AutoModelForCausalLM

    spec = SHAPES[shape].spec()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(spec))
    linears = sorted(tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert linears == sorted((p.out_features, p.in_features) for p in spec.projections())


def test_one_that_runs(
    lbq: Callable[..., Any], only: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(EAGER)
    (tmp_path / "transformers.py").write_text("raise SystemExit('this is not transformers')")
    monkeypatch.chdir(tmp_path)
    options = ("--device", "cpu", "--prompt", "5", "--tokens", "64", "--rounds", "3", "--picture", tmp_path / "a.svg")
    done = lbq("bench", "--shape", "tiny", *options, "--peers", "--json")
    assert done.code == 0, done.err
    peer, llama = json.loads(done.out)["peers"]
    assert peer["failure"] is None
    assert 0 < peer["speed"]["slowest"] <= peer["speed"]["median"]
    assert peer["nbytes"] > 2 * sum(p.out_features * p.in_features for p in SPEC.projections())
    assert llama["failure"] is not None
    assert (tmp_path / "a.svg").read_text().count("<circle") == 2


def test_rates() -> None:
    """No rate where the clock tells nothing of the other tokens."""
    found = answer(9, [(1.0, 3.0), (1.5, 5.0), (1.0, 2.0)])
    assert (found.rates, found.first_token_seconds) == ((4.0, 2.0, 8.0), 1.0)
    noisy = answer(4, [(1.0, 3.0), (1.5, 0.9), (1.0, 2.0)])
    assert noisy.rates == ()
    assert noisy.failure is not None
    assert noisy.failure.startswith("4 tokens took it no longer than 1: ")


def test_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(run, "CONTENDERS", {"x": replace(CONTENDERS[EAGER], name="unknown to the child")})
    failed, _ = run_peers(SPEC, LOAD, CPU)
    assert failed.failure == "KeyError: 'unknown to the child'"
    assert failed.speed is None


def test_llama_bench(
    lbq: Callable[..., Any], only: Callable[..., None], llama_bench: Callable[[str], None], tmp_path: Path
) -> None:
    only()
    model = tmp_path / "model.gguf"
    model.touch()
    rows = [{"n_gen": 0, "samples_ts": [9.0]}, {"n_gen": 4, "samples_ts": [3.0, 5.0, 4.0], "model_size": 7}]
    llama_bench(f"import sys; print({json.dumps(json.dumps(rows))}); assert sys.argv[1:3] == ['-m', {str(model)!r}]")
    options = ("--device", "cpu", "--prompt", "5", "--tokens", "4", "--rounds", "2", "--peers")
    done = lbq("bench", "--shape", "tiny", *options, "--gguf", model)
    assert done.code == 0, done.err
    assert "llama-bench, model.gguf 0" in done.out
    assert "4.0 (3.0 – 5.0)" in done.out
    lines = lbq("bench", "--shape", "tiny", *options, "--gguf", model, "--depth", "9,0").out.splitlines()
    ours = float(next(line.split()[7] for line in lines if line.split()[4:5] == ["0"]))  # as deep as the peer
    times = float(next(line.split()[-1] for line in lines if line.startswith("llama-bench")))
    assert times == pytest.approx(ours / 4.0, rel=0.01)
    assert "llama-bench: give it a model" in lbq("bench", "--shape", "tiny", *options).out


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('no JSON')", "not understood"),
        ("print('[]')", "measured nothing"),
        ("import sys; sys.exit('no such model')", "ended with 1: no such model"),
    ],
)
def test_llama_bench_that_fails(
    only: Callable[..., None], llama_bench: Callable[[str], None], program: str, said: str
) -> None:
    only()
    llama_bench(program)
    (found,) = run_peers(SPEC, LOAD, CPU, gguf=Path("a.gguf"))
    assert found.failure is not None
    assert said in found.failure


def test_one_that_takes_too_long_ends_with_its_children(
    only: Callable[..., None], llama_bench: Callable[[str], None], tmp_path: Path
) -> None:
    only()
    pid = tmp_path / "pid"
    llama_bench(
        "import subprocess, pathlib, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    (found,) = run_peers(SPEC, LOAD, CPU, gguf=Path("a.gguf"), limit=3.0)
    assert found.failure == "not done after 3 s"
    for _ in range(100):  # until whoever adopted it has buried it
        state = Path(f"/proc/{pid.read_text()}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child of the peer lives on")


def test_usage(lbq: Callable[..., Any]) -> None:
    assert lbq("bench", "--shape", "tiny", "--gguf", "a.gguf").code == 2
    assert lbq("bench", "--shape", "tiny", "--gguf", "a.gguf", "--peers").code == 4
