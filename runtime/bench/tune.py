"""Finding a plan for one model on one GPU: coordinate descent over the time of the whole step.

Kernels that win alone do not win in the chain, where each starts while the one before it ends; so every candidate is
timed in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from lbq.runtime.decoder import Decoder
from lbq.runtime.fused.plan import ROLES, Plan, Projecting, Role
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.kernels.attention import Heads, Short, Split, serves_short, split_for
from lbq.runtime.kernels.gemv import ArrangedWeight, Tile
from lbq.runtime.kernels.gemv.tiles import codes_a_column, whole_rows

STEPS = 128  # the most words a thread opens in a fully unrolled kernel

REGISTERS = 64  # of a thread for the activations of whole rows; fewer for the rows

AGAIN = 3  # tiles of a role that are tried a second time, beside the best of each kind

ORDER: tuple[Role, ...] = ("gate_up", "down", "qkv", "out", "head")  # most time first


@dataclass(frozen=True)
class Tried:
    """One plan and the seconds its step took; NaN where it would not run."""

    what: str
    plan: Plan
    seconds: float


def tiles(role: Role, k: int, bits: int) -> list[Tile]:
    """Tiles that leave less than half of their threads idle, and whose unrolled steps stay few."""
    columns = -(-k // codes_a_column(bits))
    least = 2 if role == "gate_up" else 1
    found = [Tile(r * least, 128 * w, w) for r in (1, 2, 4, 8) for w in (1, 2, 4)]
    found += [Tile(r, c, w) for r, c, w in ((16, 32, 2), (16, 64, 4), (8, 64, 4), (8, 128, 8), (16, 128, 8))]
    if bits == 3:  # its rows have a quarter of INT8's columns
        found += [Tile(r, c, w) for r, c, w in ((8, 32, 2), (4, 64, 4), (16, 64, 8), (32, 32, 4))]
    if role in ("out", "down", "gate_up"):  # programs that own whole blocks of 32 outputs
        found += [Tile(32 * least, c, w) for c, w in ((32, 2), (32, 4), (64, 4), (64, 8), (128, 8), (128, 16))]
        # And halves of them, where blocks are no multiple of the multiprocessors.
        found += [Tile(16 * least, c, w) for c, w in ((64, 4), (64, 8), (128, 8), (128, 16))]
    found += _whole_rows(least, k, bits)
    found = list(dict.fromkeys(found))
    found = [t for t in found if t.columns < 2 * columns or t.columns == 32]
    return [t for t in found if t.rows * t.columns // (32 * t.warps) * -(-columns // t.columns) <= STEPS]


def _whole_rows(least: int, k: int, bits: int) -> list[Tile]:
    """Tiles of rounds of whole rows, whose rows and activations leave a program registers enough."""
    words = 3 if bits == 3 else 1
    shapes = [(loads, r, n) for loads in (1, 2, 4) for r in (1, 2, 4, 8) for n in (2, 4, 8)]
    found = [
        whole_rows(k, bits, rows, rounds, loads)
        for loads, rows, rounds in shapes
        if rows >= least
        and loads * 2 * codes_a_column(bits) <= REGISTERS
        and 8 <= 4 * words * loads * rows <= REGISTERS - 16
        and 4 * loads * rows * rounds <= STEPS
    ]
    return [tile for tile in found if tile is not None]


def splits(heads: Heads, sm_count: int) -> list[Split]:
    """Ways to cut a long cache: one to two programs for each multiprocessor."""
    most = split_for(heads, sm_count).splits
    shapes = ((64, 64, 3, 4), (64, 64, 4, 4), (128, 128, 2, 4), (128, 128, 3, 8))
    return [
        Split(n, block, least, stages, warps)
        for n in dict.fromkeys((most, max(1, most // 2)))
        for block, least, stages, warps in shapes
    ]


def shorts(heads: Heads) -> list[Short]:
    """Ways to attend to a short text."""
    if not serves_short(heads):
        return []
    shapes = ((16, 1, 32), (32, 1, 16), (32, 2, 16), (64, 2, 8), (64, 4, 8), (128, 8, 4))
    found = [Short(block=b, warps=w, parts=p, onward=on) for b, w, p in shapes for on in (False, True)]
    return [short for short in found if short.fits(heads)]


def candidates(plan: Plan, role: Role, weight: ArrangedWeight, sm_count: int) -> Iterator[Plan]:
    """``plan`` with other tiles for ``role``, and one or two steps of their weights in registers early."""
    now = plan.projecting(role, weight, sm_count)
    for tile in tiles(role, weight.k, weight.bits):
        steps = 2 if tile.columns * codes_a_column(weight.bits) < weight.k else 1
        for early in range(1, steps + 1) if tile != now.tile else ():
            yield plan.with_role(role, replace(now, tile=tile, apart=False, early=early))


def variants(plan: Plan, role: Role, weight: ArrangedWeight, sm_count: int) -> Iterator[Plan]:
    """``plan`` with ``role``'s tile as it is, and the other choices about it turned round."""
    now = plan.projecting(role, weight, sm_count)
    if plan.pdl:
        yield plan.with_role(role, replace(now, ahead=not now.ahead))
        yield plan.with_role(role, replace(now, onward=not now.onward))
    if now.tile.columns * codes_a_column(weight.bits) < weight.k:
        yield plan.with_role(role, replace(now, early=3 - now.early))
    if role in ("out", "gate_up", "down"):
        yield plan.with_role(role, replace(now, apart=not now.apart))
    if plan.pdl and role == "out":  # which follows attention, that leaves the memory idle
        for lines in (1, 2):
            yield plan.with_role(role, replace(now, lines=lines))


def step_weights(decoder: Decoder) -> dict[Role, ArrangedWeight]:
    """The first layer's weights, by role: what the candidates are made for."""
    step = FusedStep(decoder, 1, Plan())
    return {role: step.products(role)[0].weight for role in ROLES if step.products(role)}


def first_heads(decoder: Decoder) -> Heads:
    """The shape of the first layer's attention."""
    return FusedStep(decoder, 1, Plan()).layers[0].attention.heads


@dataclass(frozen=True)
class Search:
    """What a descent needs to know and to call."""

    decoder: Decoder
    sm_count: int
    seconds: Callable[[Plan], float]  # a step's, under a plan
    prepare: Callable[[list[Plan]], None]  # plans that will be timed soon: their kernels may be compiled together
    left: Callable[[], float]  # seconds that may still be spent
    most: int | None = None  # candidates of a role
    again: bool = False  # search tiles for shapes that the table has too

    def descend(self, plan: Plan) -> list[Tried]:
        """Try candidates role by role, keeping what is faster; the last of the list is the plan that won.

        Tiles first, where the plan's table does not know them, then for each role the ways to hand planes on and to
        wait, then the best of the tiles again in all of these ways, then attention. Ends early, with what it has, when
        no time is left.
        """
        tried = [Tried("rule", plan, self.seconds(plan))]
        best, weights = tried[0], step_weights(self.decoder)
        for role in ORDER:
            if role in weights and (self.again or not plan.knows(role, weights[role])):
                best = self._attempt(
                    tried, best, f"{role} tile", candidates(best.plan, role, weights[role], self.sm_count)
                )
        turned = [variant for role in weights for variant in variants(best.plan, role, weights[role], self.sm_count)]
        self.prepare(turned)
        for role, weight in weights.items():
            best = self._attempt(tried, best, f"{role} way", variants(best.plan, role, weight, self.sm_count))
        again = {role: self._again(tried, best.plan, role) for role in ORDER if role in weights}
        self.prepare([plan for plans in again.values() for plan in plans])
        for role in again:
            best = self._attempt(tried, best, f"{role} again", self._again(tried, best.plan, role))
        heads = first_heads(self.decoder)
        best = self._attempt(tried, best, "short", [replace(best.plan, short=short) for short in shorts(heads)])
        return [*tried, replace(best, what="best")]

    def _again(self, tried: list[Tried], plan: Plan, role: Role) -> list[Plan]:
        """``plan`` with the best few of the tiles tried for ``role``, and every way to hand planes on and to wait:
        which is right for a tile depends on the others."""
        now: Projecting | None = getattr(plan, role)
        ranked = sorted((t for t in tried if t.what == f"{role} tile" and t.seconds == t.seconds), key=_seconds)
        by_tile: dict[Tile, Projecting] = {}
        for one in ranked:
            other: Projecting = getattr(one.plan, role)
            by_tile.setdefault(other.tile, other)
        found = []
        for other in _best_of_kinds(list(by_tile.values()), role):
            basis = other if now is None else now
            aparts = (False, True) if role in ("out", "gate_up", "down") else (False,)
            waits = list(product((False, True), repeat=2)) if plan.pdl else [(basis.ahead, basis.onward)]
            for apart, (ahead, onward) in product(aparts, waits):
                how = replace(basis, tile=other.tile, apart=apart, early=other.early, ahead=ahead, onward=onward)
                found.append(plan.with_role(role, how))
        return [one for one in found if one != plan][: self.most]

    def _attempt(self, tried: list[Tried], best: Tried, what: str, plans: Iterable[Plan]) -> Tried:
        for one in list(plans)[: self.most]:
            if self.left() <= 0:
                break
            try:
                found = Tried(what, one, self.seconds(one))
            except Exception as error:  # a tile that is too large for this GPU, say: no candidate
                found = Tried(f"{what}: {type(error).__name__}: {error}"[:200], one, float("nan"))
            tried.append(found)
            if found.seconds < best.seconds:
                best = found
        return best

    def first_candidates(self, plan: Plan) -> list[Plan]:
        """What a descent from ``plan`` will try, as far as it is known before anything is timed."""
        found = [plan]
        for role, weight in step_weights(self.decoder).items():
            if plan.knows(role, weight) and not self.again:
                continue
            found += list(candidates(plan, role, weight, self.sm_count))[: self.most]
        heads = first_heads(self.decoder)
        return found + [replace(plan, short=short) for short in shorts(heads)[: self.most]]


def _best_of_kinds(ranked: list[Projecting], role: Role) -> list[Projecting]:
    """The best few, the best whose programs own whole blocks of 32 outputs, and the best that goes in rounds."""
    whole = [one for one in ranked if one.outputs(role) % 32 == 0]
    rounds = [one for one in ranked if one.tile.rounds > 1]
    return list(dict.fromkeys([*ranked[:AGAIN], *whole[:1], *rounds[:1]]))


def _seconds(one: Tried) -> float:
    return one.seconds
