"""Decode speed on the CPU: an artifact, the same loop on the BF16 weights, and transformers' ``generate`` in BF16.

    python scripts/bench_cpu_decode.py ARTIFACT CHECKPOINT [--threads 2] [--tokens 64] [--rounds 5]

ARTIFACT was converted from CHECKPOINT. The three take turns in one process on the same threads, from the same prompt,
greedily and past any eos. A prompt's time is that of a call for one token, a decode step's is the time of a call for
all tokens less that, divided; figures are medians over the rounds. Run it on a machine that does nothing else: threads
that wait for one another measure the rest of the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM

from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import Checkpoint, open_checkpoint
from lbq.formats.spec import ModelSpec
from lbq.quantizer.families import read_spec
from lbq.runtime import load
from lbq.runtime.binding import bind
from lbq.runtime.devices import CpuDevice
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.text.generation import Engine

PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."


@dataclass(frozen=True)
class DenseWeights:
    """A BF16 checkpoint as ``lbq.runtime.binding.Weights``: nothing is quantised."""

    spec: ModelSpec
    checkpoint: Checkpoint

    def is_quantized(self, module: str) -> bool:
        del module
        return False

    def packed(self, module: str) -> PackedWeight:
        raise NotImplementedError(module)

    def dense(self, name: str) -> torch.Tensor:
        return self.checkpoint.tensor(name)

    def release(self, module: str) -> None:
        raise NotImplementedError(module)

    def release_dense(self, name: str) -> None:
        self.checkpoint.release(name)


@dataclass(frozen=True)
class Contender:
    """``run(ids, n)`` makes n tokens after the prompt ``ids``."""

    name: str
    weight_bytes: int
    run: Callable[[list[int], int], list[int]]


def engine_loop(engine: Engine) -> Callable[[list[int], int], list[int]]:
    def run(ids: list[int], count: int) -> list[int]:
        engine.truncate(0)
        tokens = [int(engine.prefill(ids).argmax())]
        while len(tokens) < count:
            tokens.append(int(engine.decode(tokens[-1]).argmax()))
        return tokens

    return run


def transformers_loop(checkpoint: Path) -> Contender:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def run(ids: list[int], count: int) -> list[int]:
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        return [int(token) for token in out[0, len(ids) :]]

    return Contender("transformers generate, BF16", sum(p.nbytes for p in model.parameters()), run)


def seconds(contender: Contender, ids: list[int], count: int) -> float:
    began = time.perf_counter()
    made = contender.run(ids, count)
    assert len(made) == count
    return time.perf_counter() - began


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", default=2, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(artifact: Path, checkpoint: Path, threads: int, tokens: int, rounds: int) -> None:
    """Compare the decode speed of ARTIFACT with that of its BF16 source CHECKPOINT."""
    torch.set_num_threads(threads)  # before any kernel is made: some plan for a number of threads
    model = load(artifact, device="cpu")
    bf16 = bind(DenseWeights(read_spec(checkpoint).spec, open_checkpoint(checkpoint)), CpuDevice(exact=False))
    contenders = [
        Contender(f"lbq, {artifact.name}", model.resident_bytes, engine_loop(model.new_engine())),
        Contender("lbq's loop, BF16 weights", bf16.resident_bytes, engine_loop(DecoderEngine(bf16.decoder, 2048))),
        transformers_loop(checkpoint),
    ]
    ids = model.prompt_ids(PROMPT)
    first: dict[str, list[float]] = {c.name: [] for c in contenders}
    step: dict[str, list[float]] = {c.name: [] for c in contenders}
    for _ in range(rounds + 1):  # the first warms up
        for contender in contenders:
            alone = seconds(contender, ids, 1)
            first[contender.name].append(alone)
            step[contender.name].append((seconds(contender, ids, tokens) - alone) / (tokens - 1))
    print(f"{threads} threads, {len(ids)} prompt tokens, {tokens} new tokens, median of {rounds} rounds\n")
    print(f"{'':32}{'prompt ms':>10}{'decode tokens/s':>17}{'worst':>8}{'best':>8}{'weights MB':>12}{'lbq is':>9}")
    ours = statistics.median(step[contenders[0].name][1:])
    for contender in contenders:
        steps = sorted(step[contender.name][1:])
        middle = statistics.median(steps)
        print(
            f"{contender.name:32}{1e3 * statistics.median(first[contender.name][1:]):10.0f}{1 / middle:17.1f}"
            f"{1 / steps[-1]:8.1f}{1 / steps[0]:8.1f}{contender.weight_bytes / 1e6:12.0f}{middle / ours:8.2f}×"
        )


if __name__ == "__main__":
    main()
