#!/usr/bin/env python3
"""The tables of docs/performance.md: measure them on a GPU, then put them into the document, which needs no GPU.

    PYTHONPATH=src python3 scripts/gpu_performance.py measure speed.json [--real ARTIFACT …]
    PYTHONPATH=src python3 scripts/gpu_performance.py render speed.json

``measure`` decodes random weights of the shapes below as ``lbq bench`` does, every case checked against a plain
reference in the same run, takes in prompts beside torch's BF16 products, and asks each ``--real`` artifact how far its
logits are from those of float32 products on the same weights. It writes what it has after every part. ``render``
replaces what stands between the two marks in the document.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
import triton
from performance_tables import GOALS, NEW, NEW_AT_DEPTH, PROMPT, Decode, Found, Prompt, Real, draw, put_into, render

from lbq.evaluation.scores import divergence
from lbq.runtime.bench.context import Bench, Model
from lbq.runtime.bench.decode import Workload
from lbq.runtime.bench.prefill import time_prompts
from lbq.runtime.bench.sweep import Machine, machine, shape_variants
from lbq.runtime.bench.sweep import measure as sweep
from lbq.runtime.devices import CudaDevice, find_device
from lbq.runtime.loading import load

DOCUMENT = Path(__file__).parents[1] / "docs/performance.md"
TEXT = Path(__file__).parents[1] / "README.md"  # what real models read: prose, code and tables
TEXT_TOKENS = 400
ROUNDS = 3
LENGTHS = (512, 2048, 8192)  # of prompts

Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """One call of the bench."""

    shape: str
    bits: int
    depths: tuple[int, ...] = (0,)
    batches: tuple[int, ...] = (1,)
    fused: bool = True
    sampled: bool = False


def runs() -> Iterator[Run]:
    """What the goals need, each INT4 model with tokens drawn, and one without the fused step."""
    weights = dict.fromkeys((goal.shape, goal.bits) for goal in GOALS)
    for shape, bits in weights:
        mine = [goal for goal in GOALS if (goal.shape, goal.bits) == (shape, bits)]
        yield Run(shape, bits, batches=tuple(dict.fromkeys((1, *(goal.batch for goal in mine)))))
        if depths := tuple(goal.depth for goal in mine if goal.depth):
            yield Run(shape, bits, depths)
        if bits == 4:
            yield Run(shape, bits, sampled=True)
    yield Run(*next(iter(weights)), fused=False)


def measure(out: Path, reals: list[Path]) -> None:
    device = find_device("cuda", exact=False)
    assert isinstance(device, CudaDevice)
    on = machine(device.device)
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    found = Found(f"{on.name}, {on.detail}", on.date, versions, on.copy)

    def part(what: object, results: Iterable[Result], to: list[Result]) -> None:
        began = time.monotonic()
        for one in results:
            to.append(one)
            print(one, flush=True)
            out.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
        print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)

    for run in runs():
        part(run, decodes(run, on, device), found.decodes)
    for shape, bits in dict.fromkeys((goal.shape, goal.bits) for goal in GOALS if goal.prompt):
        part(f"prompts of {shape} INT{bits}", prompts(shape, bits), found.prompts)
    for folder in reals:
        part(folder, (real(at) for at in [folder]), found.reals)


def decodes(run: Run, on: Machine, device: CudaDevice) -> Iterator[Decode]:
    load = Workload(PROMPT, NEW_AT_DEPTH if any(run.depths) else NEW, ROUNDS, run.sampled)
    variants = shape_variants(run.shape, [run.bits])
    # The goals count keys and values in float16, which is what a short context has.
    where = replace(device, fused=run.fused, kv_cache="float")
    for row in sweep(variants, on, where, load, run.depths, run.batches):
        one = row.decoded
        if one is None:
            print(f"not run: {row.skipped}", flush=True)
            continue
        yield Decode(
            run.shape,
            run.bits,
            row.case.depth,
            row.case.batch,
            run.fused,
            run.sampled,
            one.speed.median,
            one.speed.slowest,
            one.speed.fastest,
            row.share or 0.0,
            row.weight_bytes + one.cache_bytes,
            one.first_token_seconds,
            one.peak_bytes,
            one.check.kl,
            row.fault,
        )


def prompts(shape: str, bits: int) -> Iterator[Prompt]:
    bench = Bench.begin(600, toy=False)
    for one in time_prompts(bench, Model(shape, bits).decoder(bench.device), LENGTHS):
        yield Prompt(shape, bits, one.tokens, one.cache, one.seconds, one.rate, one.bf16)


def real(folder: Path) -> Real:
    """Against float32 on the same GPU, over the first 400 tokens of TEXT."""
    exact = load(folder, device="cuda", dtype="float32")
    ids = exact.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=True)[:TEXT_TOKENS]
    expected = exact.logits(ids).cpu()
    exact.close()
    model = load(folder, device="cuda", strict=True)
    prompt = float(divergence(expected, model.logits(ids).cpu()).mean())
    engine = model.new_engine()
    steps = [engine.prefill(ids[:1]).clone(), *(engine.decode(token).clone() for token in ids[1:])]
    decode = float(divergence(expected, torch.stack(steps).cpu()).mean())
    model.close()
    return Real(folder.name, prompt, decode)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "render"])
    parser.add_argument("results", type=Path, help="a JSON file: written by measure, read by render")
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="artifacts of real models")
    parser.add_argument("--into", type=Path, default=DOCUMENT, help="the document")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        measure(arguments.results, arguments.real)
        return 0
    found = msgspec.json.decode(arguments.results.read_bytes(), type=Found)
    picture = arguments.into.with_name("roofline.svg")
    picture.write_text(draw(found), encoding="utf-8")
    tables = f"{render(found)}\n\n![Tokens a second over the bytes that a token reads]({picture.name})"
    arguments.into.write_text(put_into(arguments.into.read_text(encoding="utf-8"), tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
