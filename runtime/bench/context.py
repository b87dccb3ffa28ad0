"""What the parts of a bench share: a device and its clock, time that is left, tables, models of random weights."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

import torch
import triton

from lbq.runtime.bench.shapes import SHAPES
from lbq.runtime.bench.timing import Clock
from lbq.runtime.bench.weights import DeviceKernels, RandomWeights
from lbq.runtime.binding import bind
from lbq.runtime.cache import DecoderState, KVCache
from lbq.runtime.decoder import Decoder
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.tables import device_table
from lbq.runtime.kernels.attention import Heads, Split
from lbq.runtime.kernels.gemv import sm_count
from lbq.runtime.kernels.gemv.triton import INTERPRETED

GROUP, PROMPT, NEW = 256, 128, 256


@dataclass(frozen=True)
class Model:
    """Random weights of a known shape."""

    shape: str
    bits: int

    def __str__(self) -> str:
        return f"{self.shape} INT{self.bits}"

    def decoder(self, device: torch.device, *, layers: int | None = None, exact: bool = False) -> Decoder:
        shape = SHAPES[self.shape]
        shape = shape if layers is None else replace(shape, layers=layers)
        group = None if self.bits == 8 else GROUP
        return bind(RandomWeights(shape.spec(), self.bits, group, device), DeviceKernels(device, exact)).decoder


def read_models(names: str) -> list[Model]:
    """Those of ``shape:bits,…``."""
    return [Model(shape, int(bits)) for shape, bits in (one.split(":") for one in names.split(","))]


@dataclass
class Bench:
    """What all parts share."""

    device: torch.device
    clock: Clock
    pdl: bool
    deadline: float
    toy: bool
    lines: list[str] = field(default_factory=list)
    copy: float = 1e9
    best: dict[Model, Plan] = field(default_factory=dict)
    cuts: dict[Heads, tuple[Split, int]] = field(default_factory=dict)  # how a long text is cut, and until when none is
    again: bool = False  # search for what the tables have too
    pool: ProcessPoolExecutor | None = None

    @classmethod
    def begin(cls, budget: float, *, toy: bool, again: bool = False) -> Bench:
        """A bench of this GPU for ``budget`` seconds; ``toy``: of a CPU, in Triton's interpreter, in a new process
        where that is not on yet."""
        if toy and not INTERPRETED:  # Triton reads it once, at its import
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
        device = torch.device("cpu") if toy else torch.device("cuda", torch.cuda.current_device())
        pdl = not toy and torch.cuda.get_device_capability() >= (9, 0)
        return cls(device, Clock(device), pdl, time.monotonic() + (1e9 if toy else budget), toy, again=again)

    def finish(self, out: str | None) -> int:
        """Say whether there were faults, write all that was said to ``out``, and give the exit code."""
        bad = sum("**" in line or "FAILED" in line for line in self.lines)
        self.say("\n" + (f"{bad} lines tell of faults." if bad else "No faults."))
        if out:
            with open(out, "w", encoding="utf-8") as file:
                file.write("\n".join(self.lines) + "\n")
        return 1 if bad else 0

    @property
    def place(self) -> str:
        """On what it runs, for a heading."""
        name = "a CPU, in Triton's interpreter" if self.toy else torch.cuda.get_device_name()
        return f"{name}: torch {torch.__version__}, Triton {triton.__version__}"

    @property
    def sms(self) -> int:
        return sm_count(self.device)

    @property
    def new(self) -> int:
        return 2 if self.toy else NEW

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, line: str = "") -> None:
        self.lines.append(line)
        print(line, flush=True)

    def part(self, what: str, run: Callable[[], None], *, least: float = 5.0) -> None:
        """Run one part if there is time for it; a failure is told and does not end the rest."""
        self.say(f"\n## {what}\n")
        if self.left() < least:
            self.say("Left out: no time left.")
            return
        began = time.monotonic()
        try:
            run()
        except Exception:
            self.say("FAILED\n```\n" + traceback.format_exc(limit=12) + "```")
        try:
            self.clock.synchronize()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:
            self.say("The device is lost: run the other parts in a new process.")
            raise SystemExit(1) from error
        self.say(f"\n({time.monotonic() - began:.1f} s)")


def start_plan(bench: Bench) -> Plan:
    """What a search begins with."""
    return Plan(pdl=bench.pdl, table=device_table(bench.device))


def state_at(decoder: Decoder, slots: int, position: int, seed: int = 3) -> DecoderState:
    """Caches of random keys and values before ``position``."""
    state = decoder.new_state(slots, dtype=torch.float16, fixed=True)
    random = torch.Generator(decoder.device).manual_seed(seed)
    for layer in state.layers:
        assert isinstance(layer, KVCache)
        layer.kv[:, :, :position].normal_(generator=random)
    state.length = position
    return state


def put(engine: DecoderEngine, state: DecoderState) -> None:
    """Make ``engine`` hold what ``state`` holds."""
    for to, was in zip(engine._state.layers, state.layers, strict=True):
        assert isinstance(to, KVCache)
        assert isinstance(was, KVCache)
        to.kv[:, :, : state.length] = was.kv[:, :, : state.length]
    engine._state.length = state.length
