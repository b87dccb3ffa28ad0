"""Mixed bits for a size: which fused units are free to have any, how small a model can get, and the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lbq.evaluation.allocation import Candidate, Choice, Frontier, frontier
from lbq.formats.errors import UsageError
from lbq.formats.quality import FrontierPoint, Sensitivity
from lbq.quantizer.plan import Quantize
from lbq.quantizer.prepare import Prepared, replan
from lbq.quantizer.request import MixedBits

BITS = (8, 4, 3)
SPACING = 0.125  # bits a weight between the points of a frontier that are kept


@dataclass(frozen=True)
class FreeUnit:
    """A fused unit whose bits nobody asked for, and what becomes of its parts at each number of bits."""

    number: int  # among the spec's units
    layer: int  # that of the model, or how many there are for the head
    steps: Mapping[int, tuple[Quantize, ...]]

    @property
    def modules(self) -> tuple[str, ...]:
        """The unit's linear layers."""
        return tuple(step.module for step in next(iter(self.steps.values())))

    def group(self, bits: int) -> int | None:
        """Weights that share a scale; None: a row."""
        first = self.steps[bits][0]
        return None if first.group == first.entry.k else first.group

    def nbytes(self, bits: int) -> int:
        """Codes and scales."""
        return sum(step.packed_bytes for step in self.steps[bits])


@dataclass(frozen=True)
class Freedom:
    """What there is to choose in a conversion: units, and the bytes and weights that are counted whatever they get."""

    prepared: Prepared
    units: tuple[FreeUnit, ...]
    count: int  # of all fused units
    fixed_bytes: int  # codes and scales of quantised weights that are not free
    weights: int  # quantised ones, free or not

    @property
    def least(self) -> float:
        """The fewest bits a weight, codes and scales."""
        return self._bpw(sum(min(map(unit.nbytes, unit.steps)) for unit in self.units))

    @property
    def most(self) -> float:
        """The most bits a weight."""
        return self._bpw(sum(max(map(unit.nbytes, unit.steps)) for unit in self.units))

    def check(self, target_bpw: float) -> None:
        """Raise UsageError where no choice is that small, or every one is smaller."""
        least, most = math.ceil(self.least * 1000) / 1000, math.floor(self.most * 1000) / 1000
        if not self.least <= target_bpw <= self.most:
            raise UsageError(
                f"--target-bpw {target_bpw:g}: this model takes {least:g} to {most:g} bits a weight with these settings"
            )

    def choose(self, sensitivity: Sequence[Sensitivity], target_bpw: float) -> Chosen:
        """The bits with the least sum of divergences at no more than ``target_bpw``; raises as :meth:`check` does.

        ``sensitivity`` holds every free unit at each of its bits.
        """
        self.check(target_bpw)
        lines = self._frontier(sensitivity)
        best = lines.best(
            math.floor(target_bpw * self.weights / 8 * (1 + 1e-12)) - self.fixed_bytes
        )  # whole bytes stay
        mixed = MixedBits(target_bpw, self._every_unit(best.bits))
        request = replace(self.prepared.request, mixed=mixed)
        return Chosen(replan(self.prepared, request), self._point(best), self._points(lines, best))

    def frontier(self, sensitivity: Sequence[Sensitivity]) -> tuple[FrontierPoint, ...]:
        """The choices from the smallest size to the largest that pays, about SPACING apart."""
        return self._points(self._frontier(sensitivity))

    def _frontier(self, sensitivity: Sequence[Sensitivity]) -> Frontier:
        found = {(s.modules, s.bits): s.kl.mean for s in sensitivity}
        return frontier(
            [[Candidate(b, unit.nbytes(b), found[unit.modules, b]) for b in unit.steps] for unit in self.units]
        )

    def _points(self, lines: Frontier, also: Choice | None = None) -> tuple[FrontierPoint, ...]:
        """Points of the frontier by size, ``also`` among them."""
        first, last = int(lines.nbytes[0]), int(lines.nbytes[-1])
        step = SPACING * self.weights / 8
        sizes = [first + round(i * step) for i in range(math.ceil((last - first) / step))]
        choices = {choice.nbytes: choice for choice in (*map(lines.best, (*sizes, last)), *([also] if also else []))}
        return tuple(self._point(choices[nbytes]) for nbytes in sorted(choices))

    def _point(self, choice: Choice) -> FrontierPoint:
        nbytes = choice.nbytes + self.fixed_bytes
        return FrontierPoint(8 * nbytes / self.weights, nbytes, choice.bits, choice.kl)

    def _bpw(self, nbytes: int) -> float:
        return 8 * (nbytes + self.fixed_bytes) / self.weights

    def _every_unit(self, bits: Sequence[int]) -> tuple[int, ...]:
        chosen = dict(zip((unit.number for unit in self.units), bits, strict=True))
        return tuple(chosen.get(number, BITS[0]) for number in range(self.count))  # no matter which if it is not free


@dataclass(frozen=True)
class Chosen:
    """A conversion whose bits have been chosen, the point that was, and the frontier that it is of."""

    prepared: Prepared
    point: FrontierPoint
    frontier: tuple[FrontierPoint, ...]


def freedom(prepared: Prepared) -> Freedom:
    """What ``--target-bpw`` may choose: every unit that no override, ``keep`` or head's bits decide.

    Three bits are left out for a reader that does not take them. Raises UsageError where nothing is left to choose.
    """
    steps = {bits: _uniform(prepared, bits) for bits in BITS if bits != 3 or "sglang" not in prepared.request.readers}
    units, spec = [], prepared.source_spec
    every = [(i, unit) for i in range(len(spec.layers)) for unit in spec.layer_units(i)] + [
        (len(spec.layers), (spec.head,))
    ]
    for number, (layer, unit) in enumerate(every):
        parts = {bits: tuple(found[p.name] for p in unit if p.name in found) for bits, found in steps.items()}
        if all(part and part[0].entry.bits == bits for bits, part in parts.items()):
            units.append(FreeUnit(number, layer, parts))
    if not units:
        raise UsageError("--target-bpw: --set, --keep and --lm-head leave nothing to choose")
    quantized = next(iter(steps.values()))
    free = {module for unit in units for module in unit.modules}
    fixed = sum(step.packed_bytes for module, step in quantized.items() if module not in free)
    weights = sum(step.entry.n * step.entry.k for step in quantized.values())
    return Freedom(prepared, tuple(units), len(every), fixed, weights)


def _uniform(prepared: Prepared, bits: int) -> dict[str, Quantize]:
    """What becomes of each quantised layer where every free unit has ``bits``."""
    count = sum(1 for _ in prepared.source_spec.units())
    request = replace(prepared.request, mixed=MixedBits(bits, (bits,) * count))
    return {step.module: step for step in replan(prepared, request).plan.steps if isinstance(step, Quantize)}
