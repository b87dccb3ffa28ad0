"""Run the peers one after the other; what is missing, fails or takes too long is said and does not end the rest."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import msgspec
import torch

from lbq.formats.spec import ModelSpec
from lbq.peers.contenders import CONTENDERS, Contender
from lbq.peers.job import Answer, Job
from lbq.runtime.bench.decode import Speed, Workload
from lbq.runtime.bench.sweep import Peer

LIMIT = 600.0  # seconds of one peer: some compile for minutes


def run_peers(
    spec: ModelSpec,
    load: Workload,
    device: torch.device,
    *,
    gguf: Path | None = None,
    limit: float = LIMIT,
    on_peer: Callable[[str], None] = lambda _: None,
) -> Iterator[Peer]:
    """Decode with each peer that is installed, at the shape of ``spec``; ``gguf``: what llama-bench shall read."""
    for contender in CONTENDERS.values():
        on_peer(contender.name)
        yield _contend(contender, spec, load, device, limit)
    on_peer("llama-bench")
    yield _llama_bench(load, device, gguf, limit)


def _contend(contender: Contender, spec: ModelSpec, load: Workload, device: torch.device, limit: float) -> Peer:
    missing = _missing(contender, spec, device)
    found = _version(contender.packages[0])
    nbytes = _bytes(contender, spec, load)
    if missing is not None:
        return Peer(contender.name, found, nbytes, None, None, missing)
    job = Job(
        contender.name,
        spec,
        load.prompt,
        load.new,
        load.rounds,
        "cuda" if device.type == "cuda" else "cpu",
        torch.get_num_threads(),
    )
    child = [sys.executable, "-P", "-m", "lbq.peers.child"]  # -P: what lies in the current folder is no package
    out, failure = _run(child, msgspec.json.encode(job), limit)
    answer = Answer(failure=failure)
    if failure is None:
        answer = msgspec.json.decode(out, type=Answer)
    if answer.failure is not None:
        return Peer(contender.name, found, nbytes, None, None, answer.failure)
    return Peer(contender.name, found, nbytes, _speed(answer.rates), answer.first_token_seconds, None)


def _missing(contender: Contender, spec: ModelSpec, device: torch.device) -> str | None:
    absent = [name for name in contender.packages if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    if device.type != "cuda" and contender.needs_gpu:
        return "needs a GPU"
    return "layers of different kinds" if len(spec.layer_kinds) > 1 else None


def _bytes(contender: Contender, spec: ModelSpec, load: Workload) -> int:
    """Layers in the contender's bits, the head and keys and values in 16."""
    head = spec.head.out_features * spec.head.in_features
    layers = sum(p.out_features * p.in_features for p in spec.projections()) - head
    mixers = [spec.layer(i).mixer for i in range(len(spec.layers))]
    keys = sum(4 * mixer.kv_heads * mixer.head_dim for mixer in mixers) * (load.prompt + load.new / 2)
    return round(layers * contender.bits / 8 + 2 * head + keys)


def _speed(rates: Sequence[float]) -> Speed:
    return Speed(statistics.median(rates), min(rates), max(rates))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class _LlamaRow(msgspec.Struct):
    n_gen: int
    samples_ts: list[float]
    model_size: int = 0
    build_number: int = 0


def _llama_bench(load: Workload, device: torch.device, gguf: Path | None, limit: float) -> Peer:
    program = shutil.which("llama-bench")
    if program is None or gguf is None:
        why = "not on the PATH" if program is None else "give it a model of this shape by --gguf FILE"
        return Peer("llama-bench", None, None, None, None, why)
    layers = "99" if device.type == "cuda" else "0"
    counts = ["-p", "0", "-n", str(load.new), "-d", str(load.prompt), "-r", str(load.rounds)]
    threads = ["-t", str(torch.get_num_threads()), "-ngl", layers]
    out, failure = _run([program, "-m", str(gguf), *counts, *threads, "-o", "json"], b"", limit)
    try:
        rows = [] if failure else msgspec.json.decode(out, type=list[_LlamaRow])
    except msgspec.MsgspecError as error:
        rows, failure = [], f"its output is not understood: {error}"
    row = next((row for row in rows if row.n_gen == load.new), None)
    if row is None:
        return Peer("llama-bench", None, None, None, None, failure or "it measured nothing")
    name = f"llama-bench, {gguf.name}"
    return Peer(name, str(row.build_number), row.model_size or None, _speed(row.samples_ts), None, None)


def _run(command: list[str], text: bytes, limit: float) -> tuple[bytes, str | None]:
    """stdout, and in words what went wrong. The process and whatever it started end with this call."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            out, err = process.communicate(text, timeout=limit)
        except subprocess.TimeoutExpired:
            return b"", f"not done after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return b"", f"it ended with {process.returncode}: {last[0][:200]}"
    return out, None
