"""What an artifact's layers become elsewhere: groups, 16-bit heads, and layers that another tool has no place for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from lbq.formats.artifact import Artifact
from lbq.formats.errors import UsageError
from lbq.formats.manifest import QuantizedModule
from lbq.formats.readers import Fit, fast_group, sglang_fit, vllm_fit
from lbq.formats.scheme import Scheme
from lbq.formats.wording import counted
from lbq.quantizer.export.layouts import SCALES, Awq, Layout
from lbq.quantizer.export.ranks import check_ranks, for_ranks, share

HEAD_WHOLE = "the head is stored as bfloat16, rounded from what its codes stand for: "
FITS: Mapping[str, Callable[[int, int, Scheme], Fit]] = {"vllm": vllm_fit, "sglang": sglang_fit}


@dataclass(frozen=True)
class Layers:
    """The layers that stay codes, with the groups that are written, the head if it becomes BF16, and what to say."""

    entries: dict[str, QuantizedModule]
    whole: str | None
    notes: tuple[str, ...]


def for_reader(artifact: Artifact, reader: str, ranks: int = 1) -> Layers:
    """An artifact's layers for vLLM or SGLang on so many GPUs. Raises UsageError for one that the tool cannot run."""
    spec, where = artifact.spec, str(artifact.folder)
    check_ranks(spec, ranks, where)
    quantized = artifact.manifest.quantized
    entries = {name: for_ranks(name, _regrouped(entry), ranks, where) for name, entry in quantized.items()}
    head, whole, notes, slow = spec.head.name, None, [], []
    for unit in spec.units():
        name = unit[0].name
        if name not in entries:
            continue
        entry = entries[name]
        fit = FITS[reader](*share(unit, spec, ranks), entry.scheme)
        if not fit.runs and name == head:
            del entries[name]
            whole, what = name, f"{reader} has {fit.text}"
            notes.append(HEAD_WHOLE + what)
        elif not fit.runs:
            raise UsageError(f"{where}: {reader} cannot run {name} (INT{entry.bits}): {fit.text}")
        elif not fit.fast:
            slow.append(fit.text)
    notes += [
        f"{reader} has no fast kernel: {text} ({counted(slow.count(text), 'unit')})" for text in dict.fromkeys(slow)
    ]
    return Layers(entries, whole, tuple(notes))


def for_layout(artifact: Artifact, layout: Layout) -> Layers:
    """An artifact's layers for GPTQ, AWQ or AutoRound. Reads scales.

    Raises UsageError for layers that the format has no place for, and for scales that float16 turns to 0 or infinity.
    """
    entries = {name: _regrouped(entry) for name, entry in artifact.manifest.quantized.items()}
    head, whole, notes = artifact.spec.head.name, None, []
    if head in entries and (isinstance(layout, Awq) or layout.problem(entries[head])):
        why = "AWQ has no quantized head" if isinstance(layout, Awq) else layout.problem(entries[head])
        del entries[head]
        whole = head
        notes.append(f"{HEAD_WHOLE}{why}")
    if isinstance(layout, Awq):
        entries = _one_group(artifact, entries)
    for name, entry in entries.items():
        if problem := layout.problem(entry):
            raise UsageError(f"{artifact.folder}: {name}: {problem}")
    if not entries:
        raise UsageError(f"{artifact.folder}: no layer but the head is quantized")
    return Layers(entries, whole, (*notes, *check_scales(artifact, entries)))


def check_scales(artifact: Artifact, entries: Mapping[str, QuantizedModule]) -> list[str]:
    """A note on scales that float16 does not hold exactly. Raises UsageError where it makes 0 or infinity of one."""
    lost, layers, worst = 0, 0, 0.0
    for name in entries:
        packed = artifact.packed(name)
        scales, half = packed.scales.double(), packed.scales.to(SCALES).double()
        if bool((half.isinf() | ((half == 0) & (scales != 0))).any()):
            raise UsageError(
                f"{artifact.folder}: {name} has scales from {float(scales.abs().min()):.1e} to "
                f"{float(scales.abs().max()):.1e}, which float16 turns to 0 or infinity; "
                "export it to vllm or sglang, which read BF16 scales"
            )
        if changed := int((half != scales).sum()):
            lost, layers = lost + changed, layers + 1
            worst = max(worst, float((half - scales).abs().max()) * (1 << (packed.bits - 1)))
    if not lost:
        return []
    what = "1 scale is" if lost == 1 else f"{lost} scales of {counted(layers, 'layer')} are"
    return [f"{what} rounded to float16: a weight changes by at most {worst:.1e}"]


def _regrouped(entry: QuantizedModule) -> QuantizedModule:
    """Groups that vLLM's and SGLang's fast kernels take, which are those of GPTQ's and AWQ's too."""
    return msgspec.structs.replace(entry, group=fast_group(entry.scheme.group) or entry.k)


def _one_group(artifact: Artifact, entries: dict[str, QuantizedModule]) -> dict[str, QuantizedModule]:
    """The smallest group for all layers: their config has one."""
    sizes = {entry.scheme.group for entry in entries.values()}
    if sizes == {None}:
        return entries
    group = min(size for size in sizes if size is not None)
    if odd := [name for name, entry in entries.items() if entry.group % group]:
        raise UsageError(
            f"{artifact.folder}: {odd[0]} has one scale a row, which does not divide into groups of {group}; AWQ has "
            "one group for all layers"
        )
    return {name: msgspec.structs.replace(entry, group=group) for name, entry in entries.items()}
