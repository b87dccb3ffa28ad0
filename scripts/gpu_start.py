#!/usr/bin/env python3
"""How long a GPU takes to its first token: ``PYTHONPATH=src python3 scripts/gpu_start.py FOLDER``.

Writes an artifact of random weights into FOLDER, drawn on the GPU, unless it is there. Then it starts ``lbq run`` again
and again, as a user does: with Triton's cache empty, and with what that left, with kernels compiled ahead or not. It
says when the first token came, and of the last ones where the time went. The files are in the system's page cache, as
after a first run. ``--shape tiny --device cpu`` tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

# What is timed here are imports too: none of lbq before a child asks for them.

PROMPT = "Why is the sky blue, and why are sunsets red? Answer in one sentence."
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
    """A token a byte, as far as ids go, and a word for every other id, as large a file as a real one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocabulary - 1]
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


def start(folder: Path, device: str, cache: Path, workers: int, *, phases: bool = False) -> float:
    """Run ``lbq run`` once; seconds to its first text. ``phases`` are told from within."""
    command = [sys.executable, __file__, str(folder), "--child", str(time.time()), "--device", device]
    command += ["--workers", str(workers), *["--phases"] * phases]
    began = time.perf_counter()
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "TRITON_CACHE_DIR": str(cache)}
    )
    assert child.stdout is not None
    first = child.stdout.read(1)
    seconds = time.perf_counter() - began
    rest, said = child.communicate()
    ended = time.perf_counter() - began
    print(
        f"first text {(first + rest)[:20]!r} after {seconds:.2f} s, ended with {child.returncode} after {ended:.2f} s"
    )
    for line in said.decode(errors="replace").splitlines():
        if phases or child.returncode or "first token after" in line:
            print(f"    {line}")
    return seconds


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


def child(folder: Path, began: float, device: str, workers: int, *, phases: bool) -> None:
    """``lbq run``; with ``phases`` its parts are timed."""
    clock = Clock(began)
    clock.at("Python")
    from lbq.cli import cli

    clock.at("the command line is imported")
    import lbq.runtime.ahead as model_ahead
    import lbq.runtime.loading  # noqa: F401  which imports all the rest

    clock.at("torch and the runtime are imported")
    model_ahead.WORKERS = workers
    loaded: list[tuple[str, bool]] = []
    if phases:
        loaded = watch_gpu(clock) if device == "cuda" else []
        watch(clock)
    cli.main(["run", str(folder), "-p", PROMPT, "--max-tokens", "1", "--device", device], standalone_mode=False)
    clock.at("done")
    clock.tell()
    compiled = [name for name, hit in loaded if not hit]
    print(f"          kernels: {len(loaded)}, of them compiled here: {len(compiled)} {compiled}", file=sys.stderr)


def watch(clock: Clock) -> None:
    from lbq.runtime import loading, ready
    from lbq.runtime.devices import CudaDevice
    from lbq.runtime.model import Model

    clock.watch(loading, "open_artifact", "mapped", tell=True)
    clock.watch(CudaDevice, "prepare", "memory is taken", tell=True)
    clock.watch(ready, "bind", "bound", tell=True)
    clock.watch(CudaDevice, "default_context", "kernels ahead are done; context", tell=True)
    clock.watch(CudaDevice, "engine", "engine", tell=True)
    clock.watch(Model, "prompt_ids", "prompt's tokens", tell=True)


def watch_gpu(clock: Clock) -> list[tuple[str, bool]]:
    """Kernels as they come, and whether from the cache."""
    import torch

    torch.zeros(1, device="cuda")
    clock.at("the GPU is ready")
    import triton

    from lbq.runtime.fused.engine import FusedEngine
    from lbq.runtime.fused.graphs import StepGraphs
    from lbq.runtime.kernels.cuda import CudaLinear
    from lbq.runtime.upload import Staging

    clock.at("Triton and the kernels are imported")
    loaded: list[tuple[str, bool]] = []

    def listener(*, src: Any, cache_hit: bool, **_: object) -> None:
        loaded.append((src.fn.__name__, cache_hit))

    triton.knobs.compilation.listener = listener
    clock.watch(Staging, "_send", "read and upload")
    clock.watch(Staging, "_slot", "    of it pinned, and waited for buffers")
    clock.watch(CudaLinear, "__init__", "arrange")
    clock.watch(FusedEngine, "prefill", "prompt", tell=True)
    clock.watch(StepGraphs, "_captured", "graph", tell=True)
    return loaded


def compare(folder: Path, device: str, workers: Sequence[int], times: int) -> None:
    """Cold and warm starts with each number of processes that compile ahead, in turn."""
    found: dict[tuple[int, str], list[float]] = {(count, kind): [] for count in workers for kind in ("cold", "warm")}
    for turn in range(times):
        for count in workers:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    print(f"{kind}, {count} processes ahead: ", end="", flush=True)
                    # The last ones of each tell where the time went, which costs a little itself.
                    phases = turn + 1 == times
                    found[count, kind].append(start(folder, device, Path(cache), count, phases=phases))
    print("\n| processes ahead | kernel cache | seconds to the first text |\n|---|---|---|")
    for (count, kind), seconds in found.items():
        print(f"| {count} | {kind} | {', '.join(f'{each:.2f}' for each in seconds)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 12], help="processes that compile ahead, by turns"
    )
    parser.add_argument("--times", type=int, default=2, help="cold starts and warm ones with each")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--phases", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.folder, options.child, options.device, options.workers[0], phases=options.phases)
        return
    if not options.folder.exists():
        began = time.perf_counter()
        write_artifact(options.folder, options.shape, options.bits, options.device)
        print(f"artifact written in {time.perf_counter() - began:.1f} s", flush=True)
    compare(options.folder, options.device, options.workers, options.times)


if __name__ == "__main__":
    main()
