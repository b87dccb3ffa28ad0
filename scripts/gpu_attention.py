#!/usr/bin/env python3
"""Check and time attention on a GPU: ``PYTHONPATH=src python3 scripts/gpu_attention.py [--out FILE]``.

One token's attention to long texts, in float16 and int8, against the copy bandwidth of the same run; causal attention
of prompts beside torch's, unfused and flash; and attention with an INT8 linear layer behind it. Tables are Markdown.
``--toy`` runs all of it at a toy size in Triton's interpreter on a CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import sys

from lbq.runtime.bench.attention import blocks, causal
from lbq.runtime.bench.caches import at_depth
from lbq.runtime.bench.context import Bench


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds")
    parser.add_argument("--out", help="write the tables to this file too")
    parser.add_argument("--toy", action="store_true", help="a toy size in Triton's interpreter, on a CPU")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    bench = Bench.begin(arguments.budget, toy=arguments.toy)
    bench.say(f"# Attention on {bench.place}")
    if not arguments.toy:
        bench.copy = bench.clock.copy_bandwidth()
        bench.say(f"\nCopy bandwidth: {bench.copy / 1e12:.3f} TB/s")
    bench.part("One token's attention, 8 × 4 heads of 128", lambda: at_depth(bench))
    bench.part("Causal attention of prompts", lambda: causal(bench))
    bench.part("With an INT8 linear layer behind it", lambda: blocks(bench))
    return bench.finish(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
