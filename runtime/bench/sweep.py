"""``lbq bench``: every combination of weights, depth and batch that was asked for, timed and checked one by one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from lbq.formats.artifact import Artifact
from lbq.formats.errors import DeviceError, LbqError, UsageError
from lbq.formats.manifest import QuantizedModule
from lbq.formats.packing import BITS, GROUPS
from lbq.formats.scheme import other_group
from lbq.formats.spec import ModelSpec
from lbq.runtime.bench.decode import Decoded, Speed, Workload, decode
from lbq.runtime.bench.shapes import SHAPES
from lbq.runtime.bench.timing import copy_bandwidth, upload_bandwidth
from lbq.runtime.bench.weights import RandomWeights
from lbq.runtime.binding import Bound, KernelUse, Weights, bind
from lbq.runtime.devices import CudaDevice, Device, device_errors
from lbq.runtime.needs import needs

GROUP = 256  # of random weights, where nothing else is asked for: what the figures of docs/performance.md have
MOST_TEXTS = 16  # at a time
SMALLER = "try a smaller --depth or model, or --device cpu"  # where memory runs out

Group = int | Literal["row"]
OnCase = Callable[[str], None]
Ended = LbqError | KeyboardInterrupt


@dataclass(frozen=True)
class Machine:
    """What everything was measured on. ``copy``: bytes a second, read and written, of copies in the device's memory;
    ``upload``: from pinned memory to a GPU."""

    name: str
    detail: str
    kind: Literal["cpu", "cuda"]
    copy: float
    upload: float | None
    torch: str
    date: str


@dataclass(frozen=True)
class Case:
    """One combination. ``weights``: as ``INT4 g256, INT8 row``, the most first; ``batch``: texts at a time."""

    weights: str
    depth: int
    batch: int

    @property
    def name(self) -> str:
        texts = "" if self.batch == 1 else f", {self.batch} texts"
        return f"{self.weights} at depth {self.depth}{texts}"


@dataclass(frozen=True)
class Row:
    """What one case reads a step and gave, all texts together; bytes are means over the new tokens.

    ``floor`` is the tokens a second at which these bytes pass at the copy bandwidth, weights once a step for all texts
    or, where they take turns, for each, and ``share`` how much of it was reached; ``over_one``: a step's time over that
    of one text, where it ran too.
    ``decoded`` is None where the case did not run, for the reason in ``skipped``.
    """

    case: Case
    weight_bytes: int  # as stored
    floor: float | None
    share: float | None
    over_one: float | None
    resident_bytes: int  # of weights, in the kernels' own arrangement
    load_seconds: float | None  # from the mapped file to the device and into that arrangement; None: drawn there
    decoded: Decoded | None
    skipped: str | None
    kernels: tuple[KernelUse, ...]
    fused: bool  # whether tokens are decoded by the fused step of a GPU
    step_fallback: str | None  # why they are not, though it was asked for
    cache_fallback: str | None  # why keys and values are not read as they are kept, if so

    @property
    def token_bytes(self) -> float | None:
        """Weights, and keys and values, that a step reads for each of its tokens."""
        return None if self.decoded is None else _token_bytes(self.weight_bytes, self.decoded, self.case.batch)

    @property
    def fault(self) -> str | None:
        """What is wrong with its numbers, in words."""
        fault = self.decoded and self.decoded.check.fault
        return f"{self.case.name}: {fault}" if fault else None


def _token_bytes(weight_bytes: int, decoded: Decoded, texts: int) -> float:
    """Texts that take turns read the weights once each."""
    passes = 1 if decoded.batch_fallback is None else texts
    return (passes * weight_bytes + decoded.cache_bytes) / texts


@dataclass(frozen=True)
class Peer:
    """What another engine gave at the same shape, or in ``failure`` why it gave nothing. ``nbytes``: of weights and
    keys a token, in its format; None where only the peer knows."""

    name: str
    version: str | None
    nbytes: int | None
    speed: Speed | None
    first_token_seconds: float | None
    failure: str | None


@dataclass(frozen=True)
class Report:
    """A run of the bench."""

    subject: str
    machine: Machine
    load: Workload
    rows: tuple[Row, ...]
    peers: tuple[Peer, ...] = ()

    def require_sound(self) -> None:
        """Raise DeviceError for numbers that are not those of the model."""
        faults = [row.fault for row in self.rows if row.fault]
        if faults:
            raise DeviceError(f"{self.subject}: {faults[0]}: these speeds are of something else than the model")


@dataclass(frozen=True)
class Variant:
    """Weights to be measured, and how to get them onto a device."""

    label: str
    spec: ModelSpec
    quantized: Mapping[str, QuantizedModule]
    drawn: bool  # on the device, rather than loaded
    open: Callable[[torch.device], Weights]


def shape_variants(shape: str, bits: Sequence[int], groups: Sequence[Group] = ()) -> list[Variant]:
    """Random weights of a known shape; without ``groups``, of 256, and one scale a row at 8 bits.

    Raises UsageError for a shape, a width or a group that lbq does not have.
    """
    if shape not in SHAPES:
        raise UsageError(f"shape {shape}: there are {', '.join(SHAPES)}")
    for value in bits:
        if value not in BITS:
            raise UsageError(f"bits {value}: there are {', '.join(map(str, BITS))}")
    for group in groups:
        if group != "row" and group not in GROUPS:
            raise UsageError(f"group {group}: there are {', '.join(map(str, GROUPS))} and row")
    spec = SHAPES[shape].spec()
    pairs = [(value, group) for value in bits for group in groups or (("row",) if value == 8 else (GROUP,))]
    return [_random(spec, value, None if group == "row" else group) for value, group in pairs]


def other_groups(shape: str, groups: Sequence[Group]) -> list[str]:
    """What is said of ``groups`` that rows of a shape do not divide into."""
    spec = SHAPES[shape].spec()
    widths = sorted({p.in_features for p in spec.projections() if p != spec.head})
    asked = [group for group in groups if group != "row"]
    return [text for group in asked for k in widths if (text := other_group(k, group)) is not None]


def _random(spec: ModelSpec, bits: int, group: int | None) -> Variant:
    quantized = RandomWeights(spec, bits, group, torch.device("cpu")).quantized
    return Variant(_label(quantized), spec, quantized, True, lambda device: RandomWeights(spec, bits, group, device))


def artifact_variant(artifact: Artifact) -> Variant:
    """The weights of an artifact, which stays open."""
    quantized = artifact.manifest.quantized
    return Variant(_label(quantized), artifact.spec, quantized, False, lambda _: artifact)


def _label(quantized: Mapping[str, QuantizedModule]) -> str:
    """``INT4 g64/g128, INT8 row``: the most weights first."""
    sizes: dict[int, dict[str, int]] = {}
    for entry in quantized.values():
        group = "row" if entry.group == entry.k else f"g{entry.group}"
        groups = sizes.setdefault(entry.bits, {})
        groups[group] = groups.get(group, 0) + entry.n * entry.k
    widths = sorted(sizes, key=lambda bits: -sum(sizes[bits].values()))
    return ", ".join(f"INT{bits} {'/'.join(sorted(sizes[bits], key=_group_order))}" for bits in widths) or "BF16"


def _group_order(name: str) -> int:
    return 0 if name == "row" else int(name[1:])


def machine(device: torch.device) -> Machine:
    """Describe ``device`` and measure its copy bandwidth."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name, detail = found.name, f"{found.multi_processor_count} SMs, compute capability {found.major}.{found.minor}"
    else:
        name, detail = _cpu_name(), f"{torch.get_num_threads()} threads"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    copy, upload = copy_bandwidth(device), upload_bandwidth(device)
    if kind == "cuda":
        torch.cuda.empty_cache()  # what was copied is as large as a model
    return Machine(name, detail, kind, copy, upload, str(torch.__version__), date)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def run(
    subject: str,
    variants: Iterable[Variant],
    device: Device,
    load: Workload,
    depths: Sequence[int] = (0,),
    batches: Sequence[int] = (1,),
    on_case: OnCase = lambda _: None,
) -> tuple[Report, Ended | None]:
    """Measure every case; what was measured before an error, and the error. Raises DeviceError before the first."""
    with device_errors(SMALLER):
        on = machine(device.device)
    rows: list[Row] = []
    error: Ended | None = None
    try:
        for row in measure(variants, on, device, load, depths, batches, on_case):
            rows.append(row)  # noqa: PERF402  what there is when it raises is kept
    except (LbqError, KeyboardInterrupt) as raised:
        error = raised
    return Report(subject, on, load, tuple(rows)), error


def measure(
    variants: Iterable[Variant],
    on: Machine,
    device: Device,
    load: Workload,
    depths: Sequence[int] = (0,),
    batches: Sequence[int] = (1,),
    on_case: OnCase = lambda _: None,
) -> Iterator[Row]:
    """One row for every variant, depth and batch; each variant is bound once. ``on_case`` hears what comes next.

    Raises DeviceError for what a GPU fails in; a case that does not fit its memory is a row that says so.
    """
    for variant in variants:
        cases = [Case(variant.label, depth, batch) for depth in depths for batch in batches]
        with device_errors(SMALLER):
            device.check_cache(variant.spec)
            yield from _Measuring(variant, on, device, load).rows(cases, on_case)
        gc.collect()
        if on.kind == "cuda":
            torch.cuda.empty_cache()


class _Measuring:
    """One variant, bound when the first case needs it."""

    def __init__(self, variant: Variant, on: Machine, device: Device, load: Workload) -> None:
        self._variant, self._on, self._device, self._load = variant, on, device, load
        self._bound: tuple[Weights, Bound] | None = None
        self._seconds = 0.0  # that binding took
        self._alone: dict[int, float] = {}  # tokens a second of one text, by depth
        self._weight_bytes = needs(variant.spec, variant.quantized, device).stored

    def rows(self, cases: Sequence[Case], on_case: OnCase) -> Iterator[Row]:
        for case in cases:
            skipped = self._why_not(case)
            decoded = None
            if skipped is None:
                on_case(case.name)
                try:
                    decoded = self._decode(case)
                except torch.OutOfMemoryError:
                    skipped = f"{case.name}: the GPU's memory does not hold it"
            if case.batch == 1 and decoded is not None:
                self._alone[case.depth] = decoded.speed.median
            yield self._row(case, decoded, skipped)

    def _why_not(self, case: Case) -> str | None:
        if not 1 <= case.batch <= MOST_TEXTS:
            return f"batch {case.batch}: 1 to {MOST_TEXTS} texts at a time"
        most, load = self._variant.spec.context, self._load
        if case.depth + load.prompt + load.new <= most:
            return None
        return (
            f"depth {case.depth}, a prompt of {load.prompt}, {load.new} new tokens: the model was made for {most} "
            "(--depth, --prompt and --tokens ask for fewer)"
        )

    def _ready(self) -> tuple[Weights, Bound]:
        if self._bound is None:
            weights = self._variant.open(self._device.device)
            began = time.perf_counter()
            self._device.prepare(needs(self._variant.spec, self._variant.quantized, self._device).weights)
            self._bound = weights, bind(weights, self._device)
            if self._on.kind == "cuda":
                torch.cuda.synchronize()
            self._seconds = time.perf_counter() - began
        return self._bound

    def _decode(self, case: Case) -> Decoded:
        weights, bound = self._ready()
        return decode(weights, bound.decoder, self._device, self._load, case.depth, case.batch)

    def _row(self, case: Case, decoded: Decoded | None, skipped: str | None) -> Row:
        floor = self._on.copy / _token_bytes(self._weight_bytes, decoded, case.batch) if decoded else None
        alone = self._alone.get(case.depth)
        bound = self._bound and self._bound[1]
        step_fallback = self._device.step_fallback(bound.decoder) if bound else None
        return Row(
            case,
            self._weight_bytes,
            floor,
            decoded.speed.median / floor if decoded and floor else None,
            case.batch * alone / decoded.speed.median if decoded and alone else None,
            bound.resident_bytes if bound else 0,
            self._seconds if bound and not self._variant.drawn else None,
            decoded,
            skipped,
            bound.kernels if bound else (),
            isinstance(self._device, CudaDevice) and self._device.fused and not step_fallback,
            step_fallback,
            self._device.cache_fallback(bound.decoder) if bound else None,
        )
