#!/usr/bin/env python3
"""Check, time and tune the fused decode step on a GPU: ``PYTHONPATH=src python3 scripts/gpu_bench.py [--out FILE]``.

Within ``--budget`` seconds and in this order, or ``--only`` some of it: ``check``, kernels against float64 and the
whole step against exact products, with itself and with programmatic dependent launch off; ``tune``, for each model of
random weights the present engine against the fused one, by rule and tuned; ``time``, the same by what is shipped;
``depth``, long contexts; ``batch``, several tokens; ``caches``; ``sampling``. ``--table`` puts what was tuned into a
table: of this GPU, or a file.

Tables are Markdown. ``--toy`` runs all of it at a toy size in Triton's interpreter on a CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from lbq.runtime.bench.caches import at_depth
from lbq.runtime.bench.checks import check_kernels, check_step
from lbq.runtime.bench.compiling import start_pool, wait_for
from lbq.runtime.bench.context import Bench, Model, read_models
from lbq.runtime.bench.details import batches, depths, sampling
from lbq.runtime.bench.models import time_model, tune_model
from lbq.runtime.bench.table import table_of, write_table
from lbq.runtime.fused.tables import path_of

MODELS = ("llama-3.1-8b:4", "qwen3-1.7b:4", "qwen3-0.6b:4", "llama-3.1-8b:8", "llama-3.1-8b:3")
PARTS = ("check", "tune", "time", "depth", "batch", "caches", "sampling")


def run_all(bench: Bench, models: list[Model], wanted: list[str], table: str | None) -> None:
    first = models[0]
    compiled: list[Future[str | None]] = []
    if not bench.toy and {"tune", "batch"} & set(wanted):
        bench.part("Compiling", lambda: compiled.extend(start_pool(bench, models)))
    if "check" in wanted:
        bench.part("Kernels against float64", lambda: check_kernels(bench))
        bench.part(f"The whole step, {first}", lambda: check_step(bench, first))
    if compiled:
        bench.part("Compiled", lambda: wait_for(bench, compiled))
    bench.copy = bench.clock.copy_bandwidth()
    bench.say(f"\nCopy bandwidth: {bench.copy / 1e12:.3f} TB/s")
    if "tune" in wanted:
        for model in models:
            bench.part(str(model), partial(tune_model, bench, model), least=25)
            if table is not None and bench.best:
                write_table(table_of(bench), path_of(table_of(bench).gpu) if table == "this" else Path(table))
    if "time" in wanted:
        for model in models:
            bench.part(f"{model}, as shipped", partial(time_model, bench, model), least=15)
    last = {
        "depth": (f"Depth, {first}", lambda: depths(bench, first), 25),
        "batch": (f"Several tokens, {first}", lambda: batches(bench, first), 25),
        "caches": ("Attention of one layer", lambda: at_depth(bench), 20),
        "sampling": ("Choosing a token", lambda: sampling(bench), 5),
    }
    for part, (what, run, least) in last.items():
        if part in wanted:
            bench.part(what, run, least=least)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="shape:bits, …")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds")
    parser.add_argument("--only", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument(
        "--table", nargs="?", const="this", metavar="FILE", help="write tuned tiles: to FILE, or to this GPU's table"
    )
    parser.add_argument("--again", action="store_true", help="search for what this GPU's table has too")
    parser.add_argument("--out", help="write the tables to this file too")
    parser.add_argument("--toy", action="store_true", help="a toy size in Triton's interpreter, on a CPU")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    bench = Bench.begin(arguments.budget, toy=arguments.toy, again=arguments.again)
    bench.say(f"# Fused decode on {bench.place}, PDL {bench.pdl}")
    models = read_models("tiny:4" if arguments.toy else arguments.models)
    try:
        run_all(bench, models, arguments.only.split(","), arguments.table)
    finally:
        if bench.pool is not None:
            bench.pool.shutdown(cancel_futures=True)
        code = bench.finish(arguments.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
