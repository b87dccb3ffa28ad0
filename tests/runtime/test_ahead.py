"""Kernels compiled while weights are uploaded: which they are, and by whom. No GPU is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
import triton

from lbq.runtime import ahead, launches
from lbq.runtime.ahead import PROMPTS, Job, compiled_ahead, job_for
from lbq.runtime.bench.shapes import SHAPES
from lbq.runtime.bench.weights import RandomWeights
from lbq.runtime.devices import CpuDevice, CudaDevice
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.gpu import Gpu
from lbq.runtime.text.sampling import SamplingOptions

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

SPEC = SHAPES["tiny"].spec()
CPU = torch.device("cpu")
QUANTIZED = RandomWeights(SPEC, 4, 32, CPU).quantized
GPU = Gpu("pretended", (9, 0), 132)
SAMPLED = SamplingOptions(temperature=0.7, top_k=20)


def job(**changed: object) -> Job:
    fields = {"prompts": PROMPTS, "ways": (SamplingOptions(), SAMPLED), **changed}
    return Job(SPEC, QUANTIZED, GPU, "auto", 256, **fields)  # type: ignore[arg-type]


def names(found: list[launches.Kernel]) -> set[str]:
    return {kernel.function.__name__ for kernel in found}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # those of pytest hold nothing
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(ahead, "WORKERS", 12)
    return tmp_path


def test_what_is_launched():
    found = launches.kernels_of(job())
    assert names(found) >= {"embed", "project", "begin", "narrow", "draw", "quantize", "heads", "dequantize", "gate"}
    assert "narrow" not in names(launches.kernels_of(job(ways=(SamplingOptions(),))))
    three = replace(job(), quantized=RandomWeights(SPEC, 3, 32, CPU).quantized)
    assert "split_planes" in names(launches.kernels_of(three))
    assert len(launches.kernels_of(job())) == len(found)  # heard again, though some might have been compiled


@pytest.mark.parametrize(("shape", "bits"), [("llama-3.1-8b", 4), ("qwen3-0.6b", 3), ("smollm2-135m", 8)])
def test_a_prompt_of_any_length_needs_no_more(shape, bits):
    spec = SHAPES[shape].spec()
    of = replace(job(), spec=spec, quantized=RandomWeights(spec, bits, None if bits == 8 else 256, CPU).quantized)
    known = set(launches.kernels_of(of))
    lengths = (1, 2, 5, 16, 17, 50, 64, 96, 97, 112, 255)
    assert set(launches.kernels_of(replace(of, prompts=lengths, context=256))) <= known


def test_layers_between_equal_ones_are_not_needed(monkeypatch):
    layers = []
    outline = launches._outline

    def counted(*arguments):
        found = outline(*arguments)
        layers.append(len(found.layers))
        return found

    monkeypatch.setattr(launches, "_outline", counted)
    spec = SHAPES["llama-3.1-8b"].spec()
    launches.kernels_of(replace(job(), spec=spec, quantized=RandomWeights(spec, 4, 256, CPU).quantized))
    assert layers == [2]


def test_processes_fill_the_cache(cache, monkeypatch):
    chosen = launches.kernels_of(job())[:3]
    monkeypatch.setattr(launches, "kernels_of", lambda _: chosen)
    with compiled_ahead(job()):
        pass
    kept = sorted(path.name for path in cache.iterdir())
    assert len(kept) >= 1 + len(chosen)
    assert sum(name.startswith("lbq-") for name in kept) == 1
    hits = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit))
    with launches.standing_in(GPU):
        for kernel in chosen:
            kernel.compile()
    assert hits == [True] * len(chosen)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("what was done is not done again"))
    with compiled_ahead(job()):
        pass


def test_processes_compute_where_threads_were_at_work(cache, monkeypatch):
    """What OpenMP's threads are asked for after a fork is never done."""

    def found(_):
        large = torch.ones(1 << 20)
        (cache / "computed").write_text(str(float((large + large)[-1])))
        return []

    monkeypatch.setattr(launches, "kernels_of", found)
    monkeypatch.setattr(ahead, "SECONDS", 5.0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.ones(1 << 20).add_(1)
        with compiled_ahead(job()):
            pass
    finally:
        torch.set_num_threads(threads)
    assert (cache / "computed").read_text() == "2.0"


def test_processes_of_a_program_that_ignores_their_ends(cache, monkeypatch):
    monkeypatch.setattr(launches, "kernels_of", lambda _: [])
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with compiled_ahead(job()):
            pass
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert any(path.name.startswith("lbq-") for path in cache.iterdir())


def test_processes_end_with_an_error(cache, monkeypatch):
    forked = []
    fork = os.fork

    def noted():
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", noted)
    with pytest.raises(KeyboardInterrupt), compiled_ahead(job()):
        raise KeyboardInterrupt
    assert len(forked) == 2
    for process in forked:
        with pytest.raises(ChildProcessError):
            os.waitpid(process, 0)
    assert not any(path.name.startswith("lbq-") for path in cache.iterdir())
    assert torch.get_num_threads() >= 1


def test_a_program_of_several_threads_is_not_forked(cache, monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    with compiled_ahead(job()):
        pass
    assert list(cache.iterdir()) == []


def test_where_it_is_not_worth_it():
    for device in (CpuDevice(exact=False), CudaDevice(exact=True), CudaDevice(exact=False, fused=False)):
        assert job_for(SPEC, QUANTIZED, device, None, SamplingOptions()) is None
    with compiled_ahead(None):
        pass


def test_hashes_do_not_follow_the_order_of_launches():
    """In a process of its own: hashes stay."""
    script = """
import random, sys
from triton.runtime.jit import JITFunction
from lbq.runtime.kernels import hashes
hashes.settle()
found = [f for name, module in sys.modules.items() if name.startswith(hashes.PACKAGE)
         for f in vars(module).values() if isinstance(f, JITFunction)]
kept = {(f.__module__, f.__name__): f.cache_key for f in found}
assert len(kept) > 30

def again(settled):
    for f in found:
        f.hash, f.used_global_vals = None, {}
    if settled:
        hashes.settle.cache_clear()
        hashes.settle()
    random.shuffle(found)
    return {(f.__module__, f.__name__): f.cache_key for f in found} == kept

assert all(again(True) for _ in range(3))
assert not all(again(False) for _ in range(3)), "Triton hashes callees first now: settle is of no use any more"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
