#!/usr/bin/env python3
"""Check and time prompts on a GPU: ``PYTHONPATH=src python3 scripts/gpu_prefill.py [--out FILE]``.

Tables are Markdown. ``--toy`` runs all of it at a toy size in Triton's interpreter on a CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from lbq.runtime.bench.context import Bench, read_models
from lbq.runtime.bench.prefill import check_prompt, prefill


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
    bench = Bench.begin(arguments.budget, toy=arguments.toy)
    bench.say(f"# Prompts on {bench.place}")
    if not arguments.toy:
        bench.copy = bench.clock.copy_bandwidth()
        bench.say(f"\nCopy bandwidth: {bench.copy / 1e12:.3f} TB/s")
    lengths = tuple(map(int, arguments.lengths.split(",")))
    models = read_models("tiny:4" if arguments.toy else arguments.models)
    bench.part(f"Against float32, {models[0]}", lambda: check_prompt(bench, models[0]))
    for model in models:
        bench.part(str(model), partial(prefill, bench, model, lengths), least=8)
    return bench.finish(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
