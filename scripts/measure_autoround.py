"""AutoRound against lbq's own round to nearest: KL divergence to the original on text that calibration never saw.

    python scripts/measure_autoround.py models/SmolLM2-135M-Instruct --calib models/wikipedia/train.json \\
        --text heldout.txt --out cells --cell 4:64 --cell 3:64 --iters 50 --seqlen 256

A cell is BITS:GROUP. Artifacts stay in the folder ``--out`` and are used again, and an interrupted conversion goes on,
so the command can be repeated until all is measured. Ends with rows for docs/autoround.md. Twelve conversions of
SmolLM2 take hours on two cores: ``--device cuda`` where there is a GPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

import click

import lbq
from lbq.formats.quality import Evaluation
from lbq.quantizer.autoround.run import Progress

HEAD = """\
| model | cell | bits | | KL divergence | less than RTN's | same top-1 | perplexity |
|---|---|---:|---|---:|---:|---:|---:|"""


def tell(progress: Progress) -> None:
    loss = "" if progress.loss is None else f": loss {progress.loss[0]:.2e} → {progress.loss[1]:.2e}"
    print(f"block {progress.finished}/{progress.blocks}{loss}", file=sys.stderr, flush=True)


def row(model: str, cell: str, method: str, found: Evaluation, against: Evaluation | None) -> str:
    kl, top, perplexity = found.scores.kl, found.scores.same_top1, found.scores.perplexity.artifact
    less = "" if against is None else f"{1 - kl.mean / against.scores.kl.mean:.0%}"
    bits = f"{found.weights.bits_per_weight:.2f}"
    return (
        f"| {model} | {cell} | {bits} | {method} | {kl.mean:.3f} ± {kl.standard_error:.3f} | {less} "
        f"| {top.mean:.1%} ± {100 * (top.standard_error or 0):.1f} | {perplexity:.2f} |"
    )


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--calib", required=True)
@click.option("--text", required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the artifacts.")
@click.option("--cell", "cells", multiple=True, required=True, metavar="BITS:GROUP")
@click.option("--iters", type=int, default=200, show_default=True)
@click.option("--nsamples", type=int, default=128, show_default=True)
@click.option("--seqlen", type=int, default=256, show_default=True)
@click.option("--max-tokens", type=int, default=4096, show_default=True, help="Of the text.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(
    model: Path,
    calib: str,
    text: Path,
    out: Path,
    cells: tuple[str, ...],
    iters: int,
    nsamples: int,
    seqlen: int,
    max_tokens: int,
    device: Literal["cpu", "cuda"],
) -> None:
    out.mkdir(exist_ok=True)
    print(HEAD)
    for cell in cells:
        bits, _, group = cell.partition(":")
        size: Literal["row"] | int = "row" if group == "row" else int(group)
        rtn = out / f"{model.name}-int{bits}-g{group}"
        tuned = out / f"{rtn.name}-i{iters}"
        if not rtn.exists():
            lbq.convert(model, rtn, bits=int(bits), group=size, device=device)
        start = time.monotonic()
        if not tuned.exists():
            lbq.convert(
                model, tuned, bits=int(bits), group=size, device=device, method="autoround", iters=iters,
                nsamples=nsamples, seqlen=seqlen, calib=calib, on_tuned=tell,
            )  # fmt: skip
            print(f"{tuned.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        base = lbq.evaluate(rtn, model, text, max_tokens=max_tokens, device=device)
        found = lbq.evaluate(tuned, model, text, max_tokens=max_tokens, device=device)
        name = f"INT{bits} g{group}"
        print(row(model.name, name, "RTN", base, None))
        print(row(model.name, name, f"AutoRound, {iters} iterations", found, base), flush=True)


if __name__ == "__main__":
    main()
