"""Chosen bits against uniform ones at equal size: predicted sums and measured KL divergences.

    lbq convert models/SmolLM2-135M-Instruct --gs 64 --report full --out measured
    python scripts/measure_mixed_bits.py models/SmolLM2-135M-Instruct measured --gs 64 --text heldout.txt \\
        --target 3.5 --target 4.25 --uniform 3:3 --uniform 4:4 --head-8 5.05 --uniform 4:8

Every choice, by what the report of the artifact says of single units, and every uniform one, BITS:BITS-OF-THE-HEAD, is
quantised when it is used; all read the text in one pass, and nothing is written. Prints docs/quality.md's table.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from lbq.evaluation.mixed import freedom
from lbq.evaluation.models import windows_of
from lbq.evaluation.scores import summarize
from lbq.evaluation.stream import Side, stream
from lbq.evaluation.study import SavedUnits
from lbq.evaluation.windows import read_text
from lbq.quantizer.on_load import QuantizedOnLoad
from lbq.quantizer.original import open_original
from lbq.quantizer.prepare import Prepared, prepare, replan
from lbq.quantizer.request import MixedBits, make_request
from lbq.quantizer.source import SourceFolder, resolve
from lbq.runtime.devices import find_device


@dataclass(frozen=True)
class Case:
    """A conversion, what it is called, the sum of its units' divergences, and how many of them have which bits."""

    name: str
    prepared: Prepared
    predicted: float
    units: str


class Study:
    """What the report of an artifact says of a model's units, all of them."""

    def __init__(self, source: SourceFolder, artifact: Path, group: str) -> None:
        self._source, self._group = source, group
        self._free = freedom(prepare(source, make_request(4, group)))
        self._saved = SavedUnits(self._free, artifact)
        self._kl = {(s.modules, s.bits): s.kl.mean for s in self._saved.study(self._free).sensitivity}

    def chosen(self, target: float, lm_head: int | None) -> Case:
        """The least sum at ``target`` bits a weight, beside a head of ``lm_head`` bits or with the head's chosen."""
        free = freedom(prepare(self._source, make_request(4, self._group, lm_head=lm_head)))
        name = f"chosen for {target:g}" + (f", head INT{lm_head}" if lm_head else "")
        return self._case(name, self._saved.study(free).choose(target).prepared)

    def uniform(self, bits: int, head: int) -> Case:
        """All layers at ``bits`` and the head at ``head``."""
        prepared = self._free.prepared
        name = prepared.source_spec.head.name
        every = tuple(head if unit.modules == (name,) else bits for unit in self._free.units)
        request = replace(prepared.request, mixed=MixedBits(bits, every))
        return self._case(f"INT{bits}, head INT{head}", replan(prepared, request))

    def _case(self, name: str, prepared: Prepared) -> Case:
        quantized = prepared.plan.quantized
        bits = [quantized[unit.modules[0]].bits for unit in self._free.units]
        predicted = sum(self._kl[unit.modules, b] for unit, b in zip(self._free.units, bits, strict=True))
        counts = Counter(bits)
        return Case(name, prepared, predicted, " / ".join(str(counts[b]) for b in (8, 4, 3)))


def measure(source: SourceFolder, cases: list[Case], text: Path, tokens: int) -> str:
    """The table of all cases, smallest first."""
    device = find_device("cpu", exact=True)
    sides = [Side(case.name, QuantizedOnLoad(case.prepared, device.device)) for case in cases]
    with open_original(source) as original:
        windows = windows_of(read_text(text), (original,), None, tokens)
        found = stream(Side("original", original), sides, windows, device)
    lines = [
        "| bits of a unit | bits | units at 8 / 4 / 3 | sum of KL | KL | same top-1 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    pairs = sorted(zip(cases, found, strict=True), key=lambda pair: pair[0].prepared.plan.bits_per_weight)
    for case, positions in pairs:
        scores = summarize(positions, len(windows))
        error = "" if scores.kl.standard_error is None else f" ± {scores.kl.standard_error:.3f}"
        lines.append(
            f"| {case.name} | {case.prepared.plan.bits_per_weight:.2f} | {case.units} | {case.predicted:.3f} "
            f"| {scores.kl.mean:.3f}{error} | {scores.same_top1.mean:.1%} |"
        )
    return "\n".join(lines)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--gs", "group", required=True, help="The group that the artifact's report was measured for.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True, help="UTF-8, held out.")
@click.option("--tokens", default=4096, show_default=True, help="Of the text.")
@click.option("--target", "targets", multiple=True, type=float, help="Bits a weight, the head's chosen too.")
@click.option("--head-8", "beside", multiple=True, type=float, help="Bits a weight beside a head of 8 bits.")
@click.option("--uniform", "uniforms", multiple=True, metavar="BITS:BITS", help="Of all layers, and of the head.")
@click.option("--threads", default=1, show_default=True)
def main(
    model: Path,
    artifact: Path,
    group: str,
    text: Path,
    tokens: int,
    targets: tuple[float, ...],
    beside: tuple[float, ...],
    uniforms: tuple[str, ...],
    threads: int,
) -> None:
    """Measure choices of bits for MODEL, by what the full report of ARTIFACT says, and print the table."""
    torch.set_num_threads(threads)
    source = resolve(model)
    study = Study(source, artifact, group)
    cases = [study.chosen(target, None) for target in targets] + [study.chosen(target, 8) for target in beside]
    for pair in uniforms:
        bits, _, head = pair.partition(":")
        cases.append(study.uniform(int(bits), int(head)))
    click.echo(measure(source, cases, text, tokens))


if __name__ == "__main__":
    main()
