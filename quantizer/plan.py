"""From a request and the headers of a checkpoint to what becomes of every tensor. Nothing is read but headers.

What differs from the request is a note; a note is said on the screen, kept in report and manifest, and refused under
``--strict``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

import msgspec
import torch

from lbq.formats.artifact import DENSE_DTYPE, packed_tensors
from lbq.formats.disk import listed
from lbq.formats.errors import DataError, UsageError
from lbq.formats.manifest import DenseTensor, QuantizedModule
from lbq.formats.readers import fast_group
from lbq.formats.safetensors_file import Checkpoint
from lbq.formats.safetensors_writer import TensorPlan
from lbq.formats.scheme import Scheme, effective_group, other_group
from lbq.formats.spec import ModelSpec, Projection
from lbq.formats.wording import counted
from lbq.quantizer.request import DEFAULT_GROUP, Request, matches, mixed_scheme

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIFFERS = "the config ties the head to the embedding, the checkpoint saves another: the saved one is used"
TUNED_SIDES = 32  # auto-round leaves layers alone whose sides are no multiples of it
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # buffers that old checkpoints carry and every reader recomputes


@dataclass(frozen=True)
class Quantize:
    """A linear layer to be stored as codes: searched at ``group``, stored at ``entry.group``, which divides it."""

    module: str
    source: str  # tensor of the checkpoint
    group: int
    entry: QuantizedModule

    @property
    def tunable(self) -> bool:
        """Whether auto-round takes a layer of this shape."""
        return self.entry.n % TUNED_SIDES == 0 and self.entry.k % TUNED_SIDES == 0

    def outputs(self) -> tuple[TensorPlan, ...]:
        """The tensors that are written."""
        return packed_tensors(self.module, self.entry)

    @property
    def packed_bytes(self) -> int:
        """Codes and scales."""
        return sum(tensor.nbytes for tensor in self.outputs()[:2])


@dataclass(frozen=True)
class Keep:
    """A tensor to be stored as BF16."""

    name: str
    source: str
    shape: tuple[int, ...]

    def outputs(self) -> tuple[TensorPlan, ...]:
        """The tensor that is written."""
        return (TensorPlan(self.name, DENSE_DTYPE, self.shape),)


@dataclass(frozen=True)
class Plan:
    """A whole conversion: steps in the order of the output, the spec of the result, and the notes."""

    spec: ModelSpec
    steps: tuple[Quantize | Keep, ...]
    notes: tuple[str, ...]

    @property
    def quantized(self) -> dict[str, QuantizedModule]:
        """The manifest's entries of quantised modules."""
        return {s.module: s.entry for s in self.steps if isinstance(s, Quantize)}

    @property
    def dense(self) -> dict[str, DenseTensor]:
        """The manifest's entries of BF16 tensors."""
        return {s.name: DenseTensor(s.shape) for s in self.steps if isinstance(s, Keep)}

    @property
    def dense_linears(self) -> list[str]:
        """Linear layers that stay BF16."""
        quantized = self.quantized
        return [p.name for p in self.spec.projections() if p.name not in quantized]

    def outputs(self) -> Iterator[TensorPlan]:
        """All tensors that are written, in order."""
        for step in self.steps:
            yield from step.outputs()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(tensor.nbytes for tensor in self.outputs())

    @property
    def bits_per_weight(self) -> float:
        """Codes and scales of the quantised weights, in bits a weight."""
        steps = [s for s in self.steps if isinstance(s, Quantize)]
        weights = sum(s.entry.n * s.entry.k for s in steps)
        return 8 * sum(s.packed_bytes for s in steps) / weights


def make_plan(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    request: Request,
    notes: Iterable[str] = (),
    head_differs: bool = False,
) -> Plan:
    """Decide every tensor's fate.

    ``notes`` are what there is to say so far. ``head_differs``: the checkpoint is tied by its config and yet saves a
    head of its own that is not the embedding.

    Raises DataError where the checkpoint does not hold what the spec needs or holds what nobody knows, UsageError for
    a pattern that names nothing and, under ``request.strict``, for anything that would be a note.
    """
    notes = list(notes)
    plan = _decide(spec, checkpoint, _schemes(spec, request, notes), request.readers, head_differs, notes)
    if "sglang" in request.readers and any(entry.bits == 3 for entry in plan.quantized.values()):
        notes.append("SGLang does not read 3-bit weights")
    if request.tuning is not None and (left := untuned(plan)):
        notes.append(
            f"{counted(left, 'layer')} of sides not divisible by {TUNED_SIDES}: rounded to nearest, "
            "AutoRound leaves them"
        )
    if request.strict and notes:
        raise UsageError(f"refused under --strict: {notes[0]}" + (f" (and {len(notes) - 1} more)" if notes[1:] else ""))
    if not plan.quantized:
        raise UsageError("nothing would be quantized: every linear layer is kept")
    return replace(plan, notes=tuple(notes))


def untuned(plan: Plan) -> int:
    """Layers, but for the head, that AutoRound would leave alone."""
    head = plan.spec.head.name
    return sum(isinstance(s, Quantize) and s.module != head and not s.tunable for s in plan.steps)


def keep_all(spec: ModelSpec, checkpoint: Checkpoint, head_differs: bool = False) -> Plan:
    """Every tensor as BF16: the original of whatever is made from this checkpoint.

    Raises DataError as :func:`make_plan` does.
    """
    return _decide(spec, checkpoint, {p.name: None for p in spec.projections()}, (), head_differs, [])


def _decide(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme | None],
    readers: tuple[str, ...],
    head_differs: bool,
    notes: list[str],
) -> Plan:
    """The steps for these schemes; what there is to say is added to ``notes``."""
    tied_source = spec.tied and not head_differs
    _check_names(spec, checkpoint, tied_source)
    spec = _untie(spec, schemes, head_differs, notes)
    steps: list[Quantize | Keep] = [_keep(checkpoint, f"{spec.embedding}.weight", (spec.vocab_size, spec.hidden_size))]
    for projection in spec.projections():
        shared = tied_source and projection.name == spec.head.name
        source = f"{spec.embedding if shared else projection.name}.weight"
        scheme = schemes[projection.name]
        if scheme is not None:
            steps.append(_quantize(checkpoint, projection, source, scheme, readers))
        elif not (spec.tied and shared):
            shape = (projection.out_features, projection.in_features)
            steps.append(_keep(checkpoint, f"{projection.name}.weight", shape, source))
        if projection.bias:
            steps.append(_keep(checkpoint, f"{projection.name}.bias", (projection.out_features,)))
    fallbacks = Counter(_fallback(p, schemes[p.name]) for p in spec.projections())
    notes.extend(f"{what} ({counted(count, 'layer')})" for what, count in fallbacks.items() if what)
    steps.extend(_keep(checkpoint, f"{name}.weight", (width,)) for name, width in spec.norms())
    notes.extend(casts(checkpoint, steps))
    return Plan(spec, tuple(sorted(steps, key=layer_order)), tuple(notes))


def _schemes(spec: ModelSpec, request: Request, notes: list[str]) -> dict[str, Scheme | None]:
    """Each linear layer's scheme before fallbacks (None: BF16), the same for all parts of a fused unit.

    Of two overrides the later wins, and what is to be kept is kept whatever the overrides say.
    """
    wishes: list[tuple[str, Scheme | None]] = [(override.pattern, override.scheme) for override in request.overrides]
    wishes += [(pattern, None) for pattern in request.keep]
    used: set[str] = set()
    widened: dict[str, int] = {}
    last = ""
    schemes: dict[str, Scheme | None] = {}
    for number, unit in enumerate(spec.units()):
        names = [projection.name for projection in unit]
        chosen = _default(number, names == [spec.head.name], request)
        wanted: dict[str, Scheme | None] = dict.fromkeys(names, chosen)
        for pattern, wish in wishes:
            if named := [name for name in names if matches(pattern, name)]:
                wanted.update(dict.fromkeys(named, wish))
                chosen, last = wish, pattern
                used.add(pattern)
        if len(set(wanted.values())) > 1:
            leaves = ", ".join(name.rpartition(".")[2] for name in names)
            what = f"{last!r} names a part of {leaves}, which are fused: widened to all of them"
            widened[what] = widened.get(what, 0) + 1
        schemes.update(dict.fromkeys(names, chosen))
    notes.extend(f"{what} ({_units(count)})" for what, count in widened.items())
    for pattern, _ in wishes:
        if pattern not in used:
            example = next(spec.projections()).name
            raise UsageError(f"pattern {pattern!r} names no linear layer of this model, such as {example}")
    return schemes


def _default(number: int, head: bool, request: Request) -> Scheme | None:
    """What a unit gets that no pattern names."""
    if head and request.lm_head == 16:
        return None
    if request.mixed is not None and not (head and request.lm_head):
        return mixed_scheme(request.mixed.bits[number], request.scheme)
    if not head:
        return request.scheme
    if request.lm_head == 4:
        return Scheme(4, request.scheme.group or (DEFAULT_GROUP if request.scheme.bits == 8 else None))
    return Scheme(8, None)


def _untie(spec: ModelSpec, schemes: Mapping[str, Scheme | None], head_differs: bool, notes: list[str]) -> ModelSpec:
    """A quantised head cannot share the BF16 embedding's tensor."""
    if not spec.tied:
        return spec
    if head_differs:
        notes.append(HEAD_DIFFERS)
    elif schemes[spec.head.name] is None:
        return spec
    return msgspec.structs.replace(spec, tied=False)


def _quantize(
    checkpoint: Checkpoint, projection: Projection, source: str, scheme: Scheme, readers: tuple[str, ...]
) -> Quantize:
    n, k = projection.out_features, projection.in_features
    check_source(checkpoint, source, (n, k))
    group = effective_group(k, scheme.group)
    stored = fast_group(group) if readers else group
    return Quantize(projection.name, source, group or k, QuantizedModule(n, k, scheme.bits, stored or k))


def _fallback(projection: Projection, scheme: Scheme | None) -> str | None:
    """What to say where the group asked for does not divide the inputs."""
    return None if scheme is None else other_group(projection.in_features, scheme.group)


def _units(count: int) -> str:
    return "1 unit" if count == 1 else f"{count} units"


def _keep(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], source: str | None = None) -> Keep:
    check_source(checkpoint, source or name, shape)
    return Keep(name, source or name, shape)


def check_source(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Raise DataError unless a tensor has this shape and floats that can be converted."""
    info = checkpoint.info(name)
    if tuple(info.shape) != shape:
        raise DataError(f"{checkpoint.folder}: {name} is {list(info.shape)}, the config says {list(shape)}")
    if info.dtype not in FLOATS:
        raise DataError(f"{checkpoint.folder}: {name} is {info.dtype}; BF16, F16 and F32 weights can be converted")


def _check_names(spec: ModelSpec, checkpoint: Checkpoint, tied_source: bool) -> None:
    """The checkpoint holds every tensor of the model, and no other but those known to be of no use."""
    needed = {f"{spec.embedding}.weight"} | {f"{name}.weight" for name, _ in spec.norms()}
    for projection in spec.projections():
        needed.add(f"{projection.name}.weight")
        if projection.bias:
            needed.add(f"{projection.name}.bias")
    spare = {f"{spec.head.name}.weight"} if tied_source else set()  # may be saved although it is tied
    check_names(checkpoint, needed - spare, spare)


def check_names(checkpoint: Checkpoint, needed: Set[str], spare: Set[str] = frozenset()) -> None:
    """Raise DataError unless the checkpoint holds the ``needed`` tensors, and no other but ``spare`` ones and those
    known to be of no use."""
    present = {name for name in checkpoint.names() if not name.endswith(IGNORED_SUFFIXES)}
    if missing := needed - present:
        raise DataError(f"{checkpoint.folder}: tensors missing: {listed(sorted(missing))}; fetch the checkpoint again")
    if unknown := present - needed - spare:
        raise DataError(f"{checkpoint.folder}: tensors that this architecture does not have: {listed(sorted(unknown))}")


def casts(checkpoint: Checkpoint, steps: list[Quantize | Keep]) -> list[str]:
    """Notes on tensors that are rounded to BF16."""
    dtypes = {str(checkpoint.info(step.source).dtype) for step in steps if isinstance(step, Keep)} - {str(DENSE_DTYPE)}
    rounded = "tensors that stay are rounded from {} to bfloat16"
    return [rounded.format(dtype.removeprefix("torch.")) for dtype in sorted(dtypes)]


def layer_order(step: Quantize | Keep) -> tuple[str, ...]:
    """By name, numbers by value: stable, and a layer's tensors lie together."""
    name = step.module if isinstance(step, Quantize) else step.name
    return tuple(part.zfill(6) if part.isdecimal() else part for part in name.split("."))
