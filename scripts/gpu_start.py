#!/usr/bin/env python3
"""How long a GPU takes to its first token: ``PYTHONPATH=src python3 scripts/gpu_start.py FOLDER``.

Writes an artifact of random weights into FOLDER, drawn on the GPU, unless it is there. Then it starts ``lbq run`` again
and again, as a user does: with Triton's cache empty, and with what that left; it says when the first token came, and
where the time went. The files are in the system's page cache, as after a first run. ``--device cpu`` tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

# What is timed here are imports too: none of lbq before a child asks for them.

PROMPT = "Why is the sky blue, and why are sunsets red? Answer in one sentence."
AHEAD = 12  # processes that compile ahead, where that is tried
TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}"


def write_artifact(folder: Path, shape: str, bits: int, device: str) -> None:
    """Random codes in the format of an artifact; its hashes are not those of its files."""
    import msgspec
    import torch
    from safetensors.torch import save_file

    from lbq.formats.artifact import packed_tensors
    from lbq.formats.disk import FileEntry
    from lbq.formats.manifest import MANIFEST, VERSION, DenseTensor, Manifest, Method, Source, Summary
    from lbq.runtime.bench.shapes import SHAPES
    from lbq.runtime.bench.weights import RandomWeights

    spec = SHAPES[shape].spec()
    weights = RandomWeights(spec, bits, None if bits == 8 else 256, torch.device(device))
    tensors: dict[str, torch.Tensor] = {}
    for module, entry in weights.quantized.items():
        packed = weights.packed(module)
        stored = (packed.words, packed.scales, torch.tensor([entry.n, entry.k]))
        for plan, tensor in zip(packed_tensors(module, entry), stored, strict=True):
            tensors[plan.name] = tensor.cpu()
    shapes: dict[str, DenseTensor] = {}
    for name in (*(name for name, _ in spec.norms()), spec.embedding):
        tensors[f"{name}.weight"] = weights.dense(f"{name}.weight").cpu()
        shapes[f"{name}.weight"] = DenseTensor(tuple(tensors[f"{name}.weight"].shape))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, spec.vocab_size)
    files = {path.name: FileEntry(path.stat().st_size, "0" * 64) for path in folder.iterdir()}
    method, source = Method({}, bits, None, None), Source("random", None, {})
    summary = Summary(1, 4.0, 1.0, 1.0, 0.1)  # of nothing
    manifest = Manifest(VERSION, spec, dict(weights.quantized), shapes, method, source, {}, summary, (), files)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A token a byte, and a word for every other id, as large a file as a real one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"w{i}" for i in range(vocabulary - len(alphabet) - 1))]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    (folder / "tokenizer.json").write_text(made.to_str())
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": vocabulary - 1}))


def rates(folder: Path) -> float:
    """Say how fast bytes get to the GPU, by several ways; the rate from pinned memory in bytes a second."""
    import torch

    from lbq.formats.artifact import open_artifact
    from lbq.runtime.bench.timing import upload_bandwidth
    from lbq.runtime.upload import Staging

    device = torch.device("cuda")
    best = upload_bandwidth(device)
    assert best is not None
    print(f"pinned memory to the GPU: {best / 1e9:.1f} GB/s; torch has {torch.get_num_threads()} threads")
    for chunk, slots, threads in ((16, 4, None), (32, 3, None), (16, 4, 8)):
        if threads is not None:
            torch.set_num_threads(threads)
        with open_artifact(folder) as artifact:  # mapped anew: its pages are faulted in
            names = [*artifact.quantized][:-1]
            staging = Staging(device, chunk=chunk << 20, slots=slots)
            staging.join([torch.zeros(chunk << 18, 1) for _ in range(slots)])  # buffers are pinned here
            staging.finish()
            torch.cuda.synchronize()
            began, nbytes = time.perf_counter(), 0
            for name in names:
                words = artifact.packed(name).words
                staging.join([words])
                nbytes += words.nbytes
            torch.cuda.synchronize()
            rate = nbytes / (time.perf_counter() - began)
        at = f"{slots} × {chunk} MiB, {torch.get_num_threads()} threads"
        print(f"mapped file to the GPU by {at}: {rate / 1e9:.1f} GB/s, {rate / best:.0%}")
    return best


def start(folder: Path, device: str, cache: Path, *, phases: bool, ahead: bool = True) -> None:
    """Run ``lbq run`` once and say when its first text came; with ``phases`` from within."""
    asked = ["run", str(folder), "-p", PROMPT, "--max-tokens", "1", "--device", device]
    command = [sys.executable, "-m", "lbq.cli", *asked]
    if phases:
        command = [sys.executable, __file__, str(folder), "--child", str(time.time()), "--device", device]
        command += ["--no-ahead"] * (not ahead)
    began = time.perf_counter()
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "TRITON_CACHE_DIR": str(cache)}
    )
    assert child.stdout is not None
    first = child.stdout.read(1)
    seconds = time.perf_counter() - began
    rest, said = child.communicate()
    print(f"first text {(first + rest)[:20]!r} after {seconds:.2f} s", end="")
    print(f", ended with {child.returncode} after {time.perf_counter() - began:.2f} s")
    lines = said.decode(errors="replace").splitlines()
    for line in lines:
        if phases or child.returncode or "first token after" in line:
            print(f"    {line}")


class Clock:
    """Seconds since the process was asked for, and what was spent inside functions."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._spent: dict[str, tuple[float, int]] = {}

    def at(self, what: str) -> None:
        print(f"{time.time() - self._began:6.2f} s  {what}", file=sys.stderr)

    def watch(self, owner: Any, name: str, what: str, *, tell: bool = False) -> None:
        """Time calls of a function and what they launched; ``tell``: say when each ends."""
        import torch

        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **options)
            if tell and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds, count = self._spent.get(what, (0.0, 0))
            self._spent[what] = (seconds + time.perf_counter() - began, count + 1)
            if tell:
                self.at(f"{what}: {time.perf_counter() - began:.2f} s")
            return result

        setattr(owner, name, timed)

    def tell(self) -> None:
        for what, (seconds, count) in self._spent.items():
            print(f"          {what}: {count} calls, {seconds:.2f} s", file=sys.stderr)


def child(folder: Path, began: float, device: str, *, ahead: bool) -> None:
    """``lbq run``, its parts timed."""
    clock = Clock(began)
    clock.at("Python")
    from lbq.cli import cli

    clock.at("the command line is imported")
    import lbq.runtime.ahead as model_ahead
    import lbq.runtime.model as model

    clock.at("torch and the runtime are imported")
    model_ahead.WORKERS = AHEAD if ahead else 0
    loaded = watch_gpu(clock) if device == "cuda" else []
    watch(clock, model)
    cli.main(["run", str(folder), "-p", PROMPT, "--max-tokens", "1", "--device", device], standalone_mode=False)
    clock.at("done")
    clock.tell()
    compiled = [name for name, hit in loaded if not hit]
    print(f"          kernels: {len(loaded)}, of them compiled here: {len(compiled)} {compiled}", file=sys.stderr)


def watch(clock: Clock, model: Any) -> None:
    from lbq.runtime.devices import CudaDevice

    clock.watch(model, "open_artifact", "mapped", tell=True)
    clock.watch(model, "bind", "bound", tell=True)
    clock.watch(CudaDevice, "default_context", "kernels ahead are done; context", tell=True)
    clock.watch(CudaDevice, "engine", "engine", tell=True)
    clock.watch(model.Model, "prompt_ids", "prompt's tokens", tell=True)


def watch_gpu(clock: Clock) -> list[tuple[str, bool]]:
    """Kernels as they come, and whether from the cache."""
    import torch

    torch.zeros(1, device="cuda")
    clock.at("the GPU is ready")
    import triton

    from lbq.runtime.fused.engine import FusedEngine
    from lbq.runtime.kernels.cuda import CudaLinear
    from lbq.runtime.upload import Staging

    clock.at("Triton and the kernels are imported")
    loaded: list[tuple[str, bool]] = []

    def listener(*, src: Any, cache_hit: bool, **_: object) -> None:
        loaded.append((src.fn.__name__, cache_hit))

    triton.knobs.compilation.listener = listener
    clock.watch(Staging, "join", "read and upload")
    clock.watch(Staging, "_slot", "    of it waited for a buffer")
    clock.watch(CudaLinear, "__init__", "arrange")
    clock.watch(FusedEngine, "prefill", "prompt", tell=True)
    clock.watch(FusedEngine, "_captured", "graph", tell=True)
    return loaded


@contextmanager
def folder(kept: Path | None) -> Iterator[Path]:
    """``kept``, or one for a while."""
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true", help="once with an empty cache, twice with what that left")
    parser.add_argument("--cache", type=Path, help="Triton's cache, empty at first, to be kept")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--no-ahead", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.folder, options.child, options.device, ahead=not options.no_ahead)
        return
    if not options.folder.exists():
        began = time.perf_counter()
        write_artifact(options.folder, options.shape, options.bits, options.device)
        print(f"artifact written in {time.perf_counter() - began:.1f} s", flush=True)
    if options.device == "cuda":
        rates(options.folder)
    runs = [("cold", True), ("warm", False), ("warm", False)]
    if not options.short:
        runs = [("cold", False), ("warm", False), ("warm", False), ("warm", True)]
    with folder(options.cache) as cache:
        for what, phases in runs:
            print(f"\nkernel cache {what}: ", end="", flush=True)
            start(options.folder, options.device, cache, phases=phases)
    if options.short:
        return
    for what, ahead in (("phases", True), ("nothing compiled ahead", False)):
        with folder(None) as cache:
            print(f"\nkernel cache cold, {what}: ", end="", flush=True)
            start(options.folder, options.device, cache, phases=True, ahead=ahead)


if __name__ == "__main__":
    main()
