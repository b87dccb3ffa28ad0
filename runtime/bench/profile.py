"""``lbq profile``: where the time of one decode step goes, launch by launch, and a Chrome trace of it.

On a GPU the events are the kernels of the step's CUDA graph as CUPTI records them, through torch's profiler; on a CPU
they are the calls of the linear layers and of attention. With programmatic dependent launch a kernel begins while the
one before it still runs: its own time counts from the end of that one, so that own times and gaps add up to the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lbq.formats.disk import storage_errors
from lbq.formats.errors import DeviceError, StorageError
from lbq.formats.manifest import QuantizedModule
from lbq.formats.spec import ModelSpec
from lbq.runtime import attention
from lbq.runtime.attention import AttentionMixer
from lbq.runtime.bench.decode import Place, hold, read_bytes
from lbq.runtime.decoder import Decoder
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.kernels.linear import Linear
from lbq.runtime.needs import stored_bytes

MARK = "lbq: "  # what labelled ranges begin with
WARM_UP = 3  # steps: kernels are compiled and graphs captured


@dataclass(frozen=True)
class Event:
    """Something that ran from ``start`` to ``end``, in seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Launch:
    """What is known of a launch before it runs: its place in the model, and the bytes it reads."""

    label: str
    nbytes: float = 0.0


@dataclass(frozen=True)
class Line:
    """``count`` launches of one kind in a step; seconds of their own, and idle before them, all together."""

    label: str
    kernel: str
    count: int
    seconds: float
    idle: float
    nbytes: float


@dataclass(frozen=True)
class Profile:
    """Of ``steps`` steps the one that took the median time. ``note``: why its launches could not be placed, if so."""

    lines: tuple[Line, ...]
    seconds: float
    steps: int
    note: str | None


def profile_decode(
    decoder: Decoder,
    place: Place,
    quantized: Mapping[str, QuantizedModule],
    depth: int,
    steps: int = 20,
    trace: Path | None = None,
) -> Profile:
    """Profile ``steps`` decode steps behind ``depth`` tokens of random keys and values.

    ``quantized``: of what the decoder is bound to. The events are written to ``trace`` as JSON for Perfetto or
    chrome://tracing. Raises DeviceError where a GPU's kernels cannot be watched.
    """
    engine = place.engine(decoder, depth + 2)
    assert isinstance(engine, DecoderEngine)
    state = hold(engine, depth)
    launches = step_launches(decoder.spec, quantized, read_bytes(decoder.spec, state, depth))
    on_gpu = place.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with nullcontext() if on_gpu else labelled(decoder):
        for _ in range(WARM_UP):
            _step(engine, depth)
        # There is one cycle, whose events are kept either way; torch 2.10 and 2.11 warn that others' would be lost.
        with profile(activities=activities, acc_events=True) as watched:
            for _ in range(steps):
                _step(engine, depth)
    if trace is not None:
        _write_trace(watched, trace)
    found = _kernels(watched.events()) if on_gpu else _marks(watched.events())
    if not found or len(found) % steps:
        raise DeviceError(f"torch's profiler saw {len(found)} kernels in {steps} steps: CUPTI is missing or forbidden")
    expected = [*launches[:1], *_with_planes(engine, launches[1:])] if on_gpu else launches[1:]
    return tabulate(found, expected, steps)


def step_launches(
    spec: ModelSpec, quantized: Mapping[str, QuantizedModule], cache_bytes: Sequence[float]
) -> list[Launch]:
    """What a step runs, in order: the embedding, five launches a layer, the head. ``cache_bytes``: layer by layer."""
    found = [Launch("embedding", 2 * spec.hidden_size)]
    for i in range(len(spec.layers)):
        qkv, out, gate_up, down = (stored_bytes(unit, quantized) for unit in spec.layer_units(i))
        found += [Launch("q/k/v", qkv), Launch("attention", cache_bytes[i]), Launch("output", out)]
        found += [Launch("gate/up", gate_up), Launch("down", down)]
    return [*found, Launch("head", stored_bytes((spec.head,), quantized))]


def tabulate(events: Sequence[Event], launches: Sequence[Launch], steps: int) -> Profile:
    """Lines of one step from the events of ``steps`` equal ones, in the order of time.

    The last events of a step are ``launches``; what comes before them prepares it. Where they are fewer than
    ``launches`` or differ in name where these do not, the events' names alone tell them apart.
    """
    size = len(events) // steps
    parts = [events[i * size : (i + 1) * size] for i in range(steps)]
    named = [Launch("")] * (size - len(launches)) + list(launches) if size >= len(launches) else None
    note = None if named else f"{size} kernels a step, and {len(launches)} were expected: told apart by name alone"
    parts.sort(key=_duration)
    chosen = parts[(steps - 1) // 2]
    found = _table(chosen, named or [Launch("")] * size)
    lines = tuple(Line(*key, sums.count, sums.seconds, sums.idle, sums.nbytes) for key, sums in found.items())
    return Profile(lines, _duration(chosen), steps, note)


def _duration(events: Sequence[Event]) -> float:
    return max(event.end for event in events) - events[0].start


@dataclass
class _Sums:
    count: int = 0
    seconds: float = 0.0
    idle: float = 0.0
    nbytes: float = 0.0


def _table(events: Sequence[Event], launches: Sequence[Launch]) -> dict[tuple[str, str], _Sums]:
    """Sums by label and kernel, in the order in which they first run."""
    found: dict[tuple[str, str], _Sums] = {}
    done = events[0].start
    for event, launch in zip(events, launches, strict=True):
        sums = found.setdefault((launch.label, event.name), _Sums())
        sums.count += 1
        sums.seconds += max(0.0, event.end - max(event.start, done))
        sums.idle += max(0.0, event.start - done)
        sums.nbytes += launch.nbytes
        done = max(done, event.end)
    return found


def _write_trace(watched: profile, trace: Path) -> None:
    """The profiler does not say when it could not write: a trace takes its name when its end is there."""
    part = trace.with_name(f"{trace.name}.part")
    with storage_errors(trace):
        try:
            watched.export_chrome_trace(str(part))
            if not part.exists() or not part.read_bytes()[-64:].rstrip().endswith(b"}"):
                raise StorageError(f"{trace}: not written to its end; is the disk full?")
            part.replace(trace)
        finally:
            for left in (part, part.with_name(f"{part.name}.tmp")):  # the latter is the profiler's own
                left.unlink(missing_ok=True)


def _step(engine: DecoderEngine, depth: int) -> None:
    engine.decode(1)
    engine.truncate(depth)
    if engine._decoder.device.type == "cuda":
        torch.cuda.synchronize()


def _kernels(events: Sequence[Any]) -> list[Event]:
    """What ran on the GPU, in the order of its start."""
    on_gpu = [e for e in events if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
    found = [Event(e.name, e.time_range.start * 1e-6, e.time_range.end * 1e-6) for e in on_gpu]
    return sorted(found, key=lambda event: event.start)


def _marks(events: Sequence[Any]) -> list[Event]:
    """Labelled ranges, without the mark."""
    marked = [e for e in events if e.name.startswith(MARK)]
    found = [Event(e.name.removeprefix(MARK), e.time_range.start * 1e-6, e.time_range.end * 1e-6) for e in marked]
    return sorted(found, key=lambda event: event.start)


def _with_planes(engine: DecoderEngine, launches: Sequence[Launch]) -> Iterator[Launch]:
    """The same with the launches between them by which a fused step writes planes apart."""
    from lbq.runtime.fused.engine import FusedEngine

    step = engine._step if isinstance(engine, FusedEngine) else None
    apart = {}
    if step is not None:
        for i, layer in enumerate(step.layers):
            for offset, product in ((2, layer.out), (3, layer.gate_up), (4, layer.down)):
                apart[5 * i + offset] = product.apart
    for i, launch in enumerate(launches):
        yield launch
        if apart.get(i):
            yield Launch(f"{launch.label}, planes")


@contextmanager
def labelled(decoder: Decoder) -> Iterator[None]:
    """Ranges in the profiler's record around every linear layer and every attention of ``decoder``."""
    plain = attention.attend
    kept: list[tuple[Any, str, Linear]] = []
    for owner, name in _linears(decoder):
        linear = getattr(owner, name)
        kept.append((owner, name, linear))
        setattr(owner, name, _Labelled(linear))
    attention.attend = lambda *arguments: _ranged("attention (torch)", plain, *arguments)
    try:
        yield
    finally:
        attention.attend = plain
        for owner, name, linear in kept:
            setattr(owner, name, linear)


def _linears(decoder: Decoder) -> Iterator[tuple[Any, str]]:
    for layer in decoder.layers:
        assert isinstance(layer.mixer, AttentionMixer)
        yield from ((layer.mixer, "qkv"), (layer.mixer, "out"), (layer.mlp, "gate_up"), (layer.mlp, "down"))
    yield decoder, "head"


class _Labelled:
    """A linear that marks its calls by its kernel."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self.kernel, self.fallback, self.resident_bytes = linear.kernel, linear.fallback, linear.resident_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """As the linear itself."""
        return _ranged(self.kernel, self._linear, x)


def _ranged(name: str, call: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    with record_function(MARK + name):
        return call(*arguments)
