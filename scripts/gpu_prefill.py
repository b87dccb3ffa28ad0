#!/usr/bin/env python3
"""Check and time prompts on a GPU: ``PYTHONPATH=src python3 scripts/gpu_prefill.py [--out FILE]``.

Tables are Markdown. ``--toy`` runs all of it at a toy size in Triton's interpreter on a CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial

import torch
import triton

from lbq.runtime.bench.context import Bench, Model
from lbq.runtime.bench.prefill import causal, check_prompt, prefill
from lbq.runtime.bench.timing import Clock
from lbq.runtime.kernels.gemv.triton import INTERPRETED


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-3.1-8b:4,llama-3.1-8b:8,llama-3.1-8b:3,qwen3-1.7b:4")
    parser.add_argument("--lengths", default="512,2048,8192", help="tokens of a prompt")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds")
    parser.add_argument("--out", help="write the tables to this file too")
    parser.add_argument("--toy", action="store_true", help="a toy size in Triton's interpreter, on a CPU")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.toy and not INTERPRETED:  # Triton reads it once, at its import
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    device = torch.device("cpu") if arguments.toy else torch.device("cuda", torch.cuda.current_device())
    budget = 1e9 if arguments.toy else arguments.budget
    bench = Bench(device, Clock(device), False, time.monotonic() + budget, arguments.toy)
    name = "a CPU, in Triton's interpreter" if arguments.toy else torch.cuda.get_device_name()
    bench.say(f"# Prompts on {name}: torch {torch.__version__}, Triton {triton.__version__}")
    if not arguments.toy:
        bench.copy = bench.clock.copy_bandwidth()
        bench.say(f"\nCopy bandwidth: {bench.copy / 1e12:.3f} TB/s")
    lengths = tuple(map(int, arguments.lengths.split(",")))
    names = "tiny:4" if arguments.toy else arguments.models
    models = [Model(shape, int(bits)) for shape, bits in (one.split(":") for one in names.split(","))]
    bench.part(f"Against float32, {models[0]}", lambda: check_prompt(bench, models[0]))
    for model in models:
        bench.part(str(model), partial(prefill, bench, model, lengths), least=8)
    bench.part("Causal attention", lambda: causal(bench), least=8)
    bad = sum("**" in line or "FAILED" in line for line in bench.lines)
    bench.say("\n" + (f"{bad} lines tell of faults." if bad else "No faults."))
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            file.write("\n".join(bench.lines) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
