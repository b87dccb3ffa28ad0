"""The tables of docs/performance.md: the targets, what one run of ``gpu_performance.py`` found, and its Markdown."""

from __future__ import annotations

from typing import Literal

import msgspec

from lbq.page.roofline import Point, roofline

MARKS = "<!-- tables of scripts/gpu_performance.py -->", "<!-- end of the tables -->"
PROMPT, NEW, NEW_AT_DEPTH = 128, 256, 128

Over = Literal["floor", "INT4", "batch 1", "torch BF16"]

OF: dict[Over, str] = {
    "floor": "",
    "INT4": " × INT4",
    "batch 1": " × one text's step",
    "torch BF16": " of torch's BF16 rate",
}


class Goal(msgspec.Struct, frozen=True):
    """One line of the targets: what is compared with what, what must be reached, and the aim."""

    shape: str
    bits: int
    must: float
    aim: float
    depth: int = 0
    batch: int = 1
    prompt: int = 0  # tokens, where it is the prompt that is timed
    over: Over = "floor"

    @property
    def name(self) -> str:
        where = f" at depth {self.depth:,}" if self.depth else f", {self.batch} texts" if self.batch > 1 else ""
        return f"{self.shape} INT{self.bits}" + (f", a prompt of {self.prompt:,}" if self.prompt else where)

    def met(self, value: float, bound: float) -> bool:
        """A batch's step is to take at most so many times a single text's; all else is to reach the bound."""
        return value <= bound if self.over == "batch 1" else value >= bound


LLAMA = "llama-3.1-8b"
FULL = 131072 - PROMPT - NEW_AT_DEPTH  # what the model was made for, with these tokens behind it
GOALS = (
    Goal(LLAMA, 4, 0.66, 0.80),
    Goal("qwen3-1.7b", 4, 0.46, 0.65),
    Goal("qwen3-0.6b", 4, 0.25, 0.45),
    Goal(LLAMA, 8, 0.80, 0.90),
    Goal(LLAMA, 3, 1.08, 1.20, over="INT4"),
    Goal(LLAMA, 4, 0.70, 0.80, depth=32768),
    Goal(LLAMA, 4, 0.70, 0.80, depth=FULL),
    Goal(LLAMA, 4, 0.60, 0.80, prompt=2048, over="torch BF16"),
    Goal(LLAMA, 4, 1.2, 1.1, batch=2, over="batch 1"),
    Goal(LLAMA, 4, 1.4, 1.2, batch=4, over="batch 1"),
    Goal(LLAMA, 4, 1.7, 1.3, batch=8, over="batch 1"),
)


class Decode(msgspec.Struct, frozen=True):
    """``lbq bench`` of one case; tokens a second are those of all texts together."""

    shape: str
    bits: int
    depth: int
    batch: int
    fused: bool
    sampled: bool
    tokens: float
    slowest: float
    fastest: float
    share: float
    nbytes: int
    first_token: float
    peak: int
    kl: float
    fault: str | None

    @property
    def step(self) -> float:
        """Seconds."""
        return self.batch / self.tokens


class Prompt(msgspec.Struct, frozen=True):
    """A prompt of ``tokens``: its seconds, and FLOP/s of its linear layers and of torch's BF16 products."""

    shape: str
    bits: int
    tokens: int
    cache: str
    seconds: float
    rate: float
    bf16: float


class Real(msgspec.Struct, frozen=True):
    """Mean KL divergence, in nats, of an artifact's logits from those of float32 on its weights."""

    name: str
    prompt: float
    decode: float


class Found(msgspec.Struct):
    """Everything of one run."""

    gpu: str
    date: str
    versions: str
    copy: float
    decodes: list[Decode] = []
    prompts: list[Prompt] = []
    reals: list[Real] = []


def value_of(goal: Goal, found: Found) -> float | None:
    """What ``goal`` compares, or None where it was not measured."""
    if goal.prompt:
        timed = [p for p in found.prompts if (p.shape, p.bits, p.tokens) == (goal.shape, goal.bits, goal.prompt)]
        return next((p.rate / p.bf16 for p in timed if p.cache == "float16"), None)
    this = _decode(found, goal.shape, goal.bits, goal.depth, goal.batch)
    if this is None or this.fault:
        return None
    if goal.over == "floor":
        return this.share
    other = _decode(found, goal.shape, 4, 0, 1)
    if other is None:
        return None
    return this.tokens / other.tokens if goal.over == "INT4" else this.step / other.step


def _decode(
    found: Found, shape: str, bits: int, depth: int, batch: int, *, fused: bool = True, sampled: bool = False
) -> Decode | None:
    key = (shape, bits, depth, batch, fused, sampled)
    return next((d for d in found.decodes if (d.shape, d.bits, d.depth, d.batch, d.fused, d.sampled) == key), None)


def render(found: Found) -> str:
    """The tables, in Markdown."""
    lines = [
        f"Measured on {found.date[:10]} on one {found.gpu}, {found.versions}, by `scripts/gpu_performance.py`; memory "
        f"copied at {found.copy / 1e12:.2f} TB/s, bytes read and written.\n"
    ]
    lines += ["| | tokens/s | reached | must | aim |", "|---|---:|---:|---:|---:|"]
    lines += [_goal_line(goal, found) for goal in GOALS]
    lines += ["", *_decode_table(found), "", *_prompt_table(found)]
    if found.reals:
        lines += [
            "",
            "| a real model's logits, KL to float32 on the same weights | prompt | decode |",
            "|---|---:|---:|",
        ]
        lines += [f"| {r.name} | {r.prompt:.1e} | {r.decode:.1e} |" for r in found.reals]
    return "\n".join(lines)


def _goal_line(goal: Goal, found: Found) -> str:
    value = value_of(goal, found)
    timed = None if goal.prompt else _decode(found, goal.shape, goal.bits, goal.depth, goal.batch)
    speed = f"{timed.tokens:,.0f}" if timed else ""

    def show(number: float, ratio: str = "g") -> str:
        return f"{number:.1%}" if goal.over in ("floor", "torch BF16") else f"{number:{ratio}}"

    reached = "not measured" if value is None else show(value, ".3f") + OF[goal.over]
    if value is not None and goal.met(value, goal.must):
        reached = f"**{reached}**"
    return f"| {goal.name} | {speed} | {reached} | {show(goal.must)} | {show(goal.aim)} |"


def _decode_table(found: Found) -> list[str]:
    lines = [
        "| decode | tokens/s: median (slowest – fastest) | share of the floor | drawn, top-k and top-p | unfused | "
        "bytes a token | first token | peak memory | KL to the reference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for d in found.decodes:
        if not d.fused or d.sampled:
            continue
        other = {
            name: _decode(found, d.shape, d.bits, d.depth, d.batch, **way)
            for name, way in (("drawn", {"sampled": True}), ("unfused", {"fused": False}))
        }
        name = Goal(d.shape, d.bits, 0, 0, d.depth, d.batch).name
        cells = [
            name + (f" **{d.fault}**" if d.fault else ""),
            f"{d.tokens:,.0f} ({d.slowest:,.0f} – {d.fastest:,.0f})",
            f"{d.share:.1%}",
            *(f"{o.tokens:,.0f}" if o else "" for o in other.values()),
            f"{d.nbytes / 1e6:,.0f} MB",
            f"{d.first_token * 1e3:.1f} ms",
            f"{d.peak / 1e9:.1f} GB",
            f"{d.kl:.0e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _prompt_table(found: Found) -> list[str]:
    lines = ["| prompt | cache | ms | tokens/s | share of torch's BF16 rate |", "|---|---|---:|---:|---:|"]
    return lines + [
        f"| {p.shape} INT{p.bits}, {p.tokens:,} tokens | {p.cache} | {p.seconds * 1e3:.1f} | "
        f"{p.tokens / p.seconds:,.0f} | {p.rate / p.bf16:.0%} of {p.bf16 / 1e12:.0f} TFLOP/s |"
        for p in found.prompts
    ]


def draw(found: Found) -> str:
    """The roofline of what was decoded greedily by the fused step, one text at a time, as an SVG."""
    points = [
        Point(d.nbytes, d.tokens, f"{Goal(d.shape, d.bits, 0, 0, d.depth).name}: {d.share:.0%}", "lbq")
        for d in found.decodes
        if d.fused and not d.sampled and d.batch == 1 and not d.fault
    ]
    return roofline(found.gpu.partition(",")[0], "one text, greedy", found.copy, points)


def put_into(document: str, tables: str) -> str:
    """``document`` with ``tables`` between the marks. Raises SystemExit where it does not have them."""
    before, first, rest = document.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not (first and last):
        raise SystemExit(f"the document has no {' … '.join(MARKS)}")
    return f"{before}{first}\n\n{tables}\n\n{last}{after}"
