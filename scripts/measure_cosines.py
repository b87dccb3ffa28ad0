"""Which cosines round to nearest and calibration have on real weights, and what the models then say.

    python scripts/measure_cosines.py models/SmolLM2-135M-Instruct --text heldout.txt \\
        [--with int3-g128-autoround --with gptq-int4 …]
    python scripts/measure_cosines.py models/SmolLM2-135M-Instruct  # weights alone

Every linear layer but the head is rounded to nearest at 2, 3 and 4 bits, one scale a row and in groups, by three scale
rules, and read beside the original in one pass as ``lbq compare`` does; ``--with`` adds artifacts and other tools'
checkpoints. 2 bits are here alone: lbq does not write them.

Prints a Markdown table: the cosine of all those weights together, its range over layers, the mean logit cosine, and the
KL divergence. Then, for each width, in how many pairs of rows a cosine prefers the one with the larger divergence, of
the pairs whose divergences differ by more than two standard errors of the difference; and the grossest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray

from lbq.evaluation.models import open_model, open_stored, windows_of
from lbq.evaluation.scores import estimate, summarize
from lbq.evaluation.stream import Side, stream
from lbq.evaluation.windows import read_text
from lbq.formats.packing import PackedWeight
from lbq.formats.scheme import effective_group
from lbq.quantizer.measure import Meter
from lbq.quantizer.rtn import DEFAULT_RULES, ScaleRule, _round, _scales  # the parts of quantize() that know no widths
from lbq.runtime.binding import Weights
from lbq.runtime.devices import find_device, set_threads

ROWS = 4096  # of a matrix that are rounded at a time


class Setting(NamedTuple):
    """How a layer is rounded; ``group`` None is one scale a row."""

    bits: int
    group: int | None
    rule: ScaleRule

    def __str__(self) -> str:
        return f"INT{self.bits} {'row' if self.group is None else f'g{self.group}'}, {self.rule.value}"

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """What ``weight`` [N, K] becomes, float32."""
        group = effective_group(weight.shape[1], self.group) or weight.shape[1]
        return torch.cat([self._block(rows, group) for rows in weight.split(ROWS)])

    def _block(self, rows: torch.Tensor, group: int) -> torch.Tensor:
        grouped = rows.to(torch.float32).reshape(len(rows), -1, group)
        scales = _scales(grouped, self.bits, self.rule).to(torch.float32).unsqueeze(2)
        return (_round(grouped, scales, self.bits) * scales).view(rows.shape)


class Layers:
    """Weights that are compared with the original's, layer by layer, when a runtime takes them; or, with a setting,
    the original's as it rounds them. The head is left out of the comparison and of the rounding."""

    def __init__(self, original: Weights, weights: Weights | None = None, setting: Setting | None = None) -> None:
        self._original, self._weights, self._setting = original, weights or original, setting
        self.spec = self._weights.spec
        self._names = {p.name for p in self.spec.projections()} - {self.spec.head.name}
        self._meters: dict[str, Meter] = {}

    @property
    def cosines(self) -> list[float]:
        """Of each layer."""
        return [meter.cosine for meter in self._meters.values()]

    @property
    def cosine(self) -> float:
        """Of all of them together."""
        assert self._meters.keys() == self._names
        whole = Meter()
        for meter in self._meters.values():
            whole.source += meter.source
            whole.result += meter.result
            whole.error += meter.error
        return whole.cosine

    def take_all(self) -> None:
        """Compare every layer, for no runtime."""
        for module in sorted(self._names):
            if self.is_quantized(module):
                self.packed(module)
                self.release(module)
            else:
                self.dense(f"{module}.weight")
                self.release_dense(f"{module}.weight")

    def is_quantized(self, module: str) -> bool:
        """See :class:`Weights`, as all of the following."""
        return self._weights.is_quantized(module)

    def packed(self, module: str) -> PackedWeight:
        weight = self._weights.packed(module)
        if module in self._names:
            self._measure(module, weight.dequantize())
        return weight

    def dense(self, name: str) -> torch.Tensor:
        weight = self._weights.dense(name)
        module = name.removesuffix(".weight")
        if module not in self._names:
            return weight
        if self._setting is not None:
            weight = self._setting.of(weight)
        self._measure(module, weight.to(torch.float32).clone())
        return weight

    def release(self, module: str) -> None:
        self._weights.release(module)

    def release_dense(self, name: str) -> None:
        self._weights.release_dense(name)

    def _measure(self, module: str, found: torch.Tensor) -> None:
        self._meters[module] = Meter()
        self._meters[module].add(self._original.dense(f"{module}.weight").to(torch.float32), found)


@dataclass(frozen=True)
class Found:
    """A row of the table. ``bits``: which rows it is compared with."""

    name: str
    bits: int
    cosine: float
    layers: tuple[float, float]  # the least and the greatest
    logit_cosine: float
    same_top1: float
    kl: NDArray[np.float64]  # [positions]

    def line(self, windows: int) -> str:
        kl = estimate(self.kl, windows)
        layers = f"{self.layers[0]:.3f} to {self.layers[1]:.3f}"
        divergence = f"{kl.mean:.3f} ± {kl.standard_error or 0:.3f}"
        return (
            f"| {self.name} | {self.cosine:.4f} | {layers} | {self.logit_cosine:.4f} | {divergence} "
            f"| {self.same_top1:.1%} |"
        )


def settings(group: int) -> list[Setting]:
    """By absmax, a row and in groups; by the least squared error; by lbq's own rule, that of 3 bits at 2 as well."""
    rules = {2: ScaleRule.SIGNED_L4, 3: DEFAULT_RULES[3], 4: DEFAULT_RULES[4]}
    found = []
    for bits, rule in rules.items():
        found.append(Setting(bits, None, ScaleRule.ABSMAX))
        found += [Setting(bits, group, each) for each in (ScaleRule.ABSMAX, ScaleRule.SIGNED_MSE, rule)]
    return found


def bits_of(weights: Weights) -> int:
    """Of most layers of an artifact or another tool's checkpoint, by what a layer takes."""
    module = next(p.name for p in weights.spec.projections() if p.name != weights.spec.head.name)
    if weights.is_quantized(module):
        return weights.packed(module).bits
    values = weights.dense(f"{module}.weight")[0, :32]  # within a group
    return max(2, (len(values.unique()) - 1).bit_length())


def mistakes(found: Sequence[Found], cosine: str, windows: int) -> list[str]:
    """How often a cosine prefers the row of the larger divergence, by width."""
    lines = []
    for bits in sorted({row.bits for row in found}):
        wrong, pairs = [], 0
        for a, b in combinations([row for row in found if row.bits == bits], 2):
            difference = estimate(a.kl - b.kl, windows)
            if abs(difference.mean) <= 2 * (difference.standard_error or 0):
                continue
            pairs += 1
            better, worse = (a, b) if difference.mean < 0 else (b, a)
            if getattr(worse, cosine) > getattr(better, cosine):
                wrong.append((float(worse.kl.mean() / better.kl.mean()), worse, better))
        line = f"INT{bits}: {len(wrong)} of {pairs} pairs"
        if wrong:
            ratio, worse, better = max(wrong, key=lambda pair: pair[0])
            line += f"; {worse.name} has {getattr(worse, cosine):.4f} and {ratio:.1f} times the divergence of "
            line += f"{better.name} with {getattr(better, cosine):.4f}"
        lines.append(line)
    return lines


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Without one, weights alone.")
@click.option("--with", "others", type=click.Path(path_type=Path, exists=True), multiple=True, help="Also measured.")
@click.option("--gs", "group", default=128, show_default=True)
@click.option("--context", type=int, help="Tokens of a window.  [512, or what the model was made for]")
@click.option("--max-tokens", default=4096, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    checkpoint: Path,
    text: Path | None,
    others: tuple[Path, ...],
    group: int,
    context: int | None,
    max_tokens: int,
    threads: int,
) -> None:
    """Measure CHECKPOINT's cosines and divergences."""
    set_threads(threads)
    with ExitStack() as stack:
        original = open_model(checkpoint)
        stack.enter_context(original)
        sides = {str(setting): (Layers(original, setting=setting), setting.bits) for setting in settings(group)}
        for path in others:
            model = open_stored(path)
            stack.enter_context(model)
            sides[path.name] = (Layers(original, model), bits_of(model))
        if text is None:
            print("| | weight cosine | of layers |\n|---|---:|---:|")
            for name, (layers, _) in sides.items():
                layers.take_all()
                print(f"| {name} | {layers.cosine:.4f} | {min(layers.cosines):.3f} to {max(layers.cosines):.3f} |")
            return
        windows = windows_of(read_text(text), (original,), context, max_tokens)
        students = [Side(name, layers) for name, (layers, _) in sides.items()]
        positions = stream(Side(str(checkpoint), original), students, windows, find_device("cpu", exact=True))
    found = []
    for (name, (layers, bits)), each in zip(sides.items(), positions, strict=True):
        scores = summarize(each, len(windows))
        extremes = (min(layers.cosines), max(layers.cosines))
        logits, top = scores.logit_cosine.mean, scores.same_top1.mean
        found.append(Found(name, bits, layers.cosine, extremes, logits, top, each.kl))
    print("| | weight cosine | of layers | logit cosine | KL divergence | same top-1 |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in sorted(found, key=lambda row: (row.bits, row.cosine)):
        print(row.line(len(windows)))
    for what, cosine in (("weight", "cosine"), ("logit", "logit_cosine")):
        print(f"\nWrong by the {what} cosine:")
        print("\n".join(mistakes(found, cosine, len(windows))))
    print(f"\n{windows.positions} positions in {len(windows)} windows of {windows.context} tokens")


if __name__ == "__main__":
    main()
