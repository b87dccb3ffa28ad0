"""What the page says beyond manifest and report: headline numbers, charts and tables, ready for the template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from lbq.formats.disk import FileEntry
from lbq.formats.manifest import PAGE, Manifest, Method
from lbq.formats.quality import Quality, Scores, Sensitivity
from lbq.formats.report import ModuleReport, Report
from lbq.formats.wording import size
from lbq.page import charts, maps
from lbq.page.charts import Alone, Plot
from lbq.page.maps import Map
from lbq.page.numbers import cosine, number, percent, perplexity, with_error
from lbq.page.parts import Empty, Parts, Unit, parts_of

_WORST = 10
_METHODS = {"rtn": "Round to nearest", "autoround": "AutoRound", "import": "Imported"}
_LABELS = {"name": "method", "keep": "stays BF16", "set": "other bits", "lm_head": "bits of the head", "readers": "for"}

Files = tuple[tuple[str, FileEntry], ...]


@dataclass(frozen=True)
class Figure:
    """A headline number."""

    label: str
    value: str
    error: str | None
    note: str


@dataclass(frozen=True)
class Measured:
    """What a text showed. Empty tuples and None where it was not asked for."""

    spread: str
    frontier: Plot | None
    panels: tuple[Plot, ...]
    bits: tuple[int, ...]  # that sensitivities were measured at
    sensitive: tuple[tuple[Unit, dict[int, Alone]], ...]  # the most sensitive units


@dataclass(frozen=True)
class View:
    """One page."""

    scheme: str
    lead: str
    figures: tuple[Figure, ...]
    measured: Measured | None
    parts: Parts
    cosines: tuple[Plot, ...]
    errors: Map | None
    storage: Map | None
    by_layer: tuple[tuple[str, ...], ...]
    worst: tuple[ModuleReport, ...]
    settings: tuple[tuple[str, str], ...]
    source_files: Files
    files: Files


def view_of(manifest: Manifest, report: Report) -> View:
    """Everything about one artifact; ``report`` is of the layers of ``manifest``."""
    parts, quality, method = parts_of(manifest.spec, report), report.quality, manifest.method
    return View(
        scheme=_scheme(method),
        lead=_lead(manifest),
        figures=tuple(_figures(manifest, quality.scores if quality else None)),
        measured=_measured(quality, manifest, parts) if quality else None,
        parts=parts,
        cosines=charts.cosines(parts),
        errors=maps.errors(parts),
        storage=maps.storage(parts),
        by_layer=_by_layer(parts),
        worst=tuple(sorted(report.modules, key=lambda module: module.cosine)[:_WORST]),
        settings=tuple(_settings(method)),
        source_files=_sorted(manifest.source.files),
        files=_sorted(manifest.files),
    )


def _sorted(files: Mapping[str, FileEntry]) -> Files:
    """By name, and without the page: it cannot have its own hash."""
    return tuple((name, files[name]) for name in sorted(files) if name != PAGE)


def _weight_bytes(files: Mapping[str, FileEntry]) -> int:
    return sum(entry.size for name, entry in files.items() if name.endswith(".safetensors"))


def _lead(manifest: Manifest) -> str:
    method, spec = manifest.method, manifest.spec
    bits = "bits chosen unit by unit"
    if method.bits is not None:
        bits = f"{_scheme(method)}, head {'BF16' if method.lm_head == 16 else f'INT{method.lm_head}'}"
    return (
        f"{_METHODS.get(method.name, method.name)}, {bits}. "
        f"{len(spec.layers)} layers of width {spec.hidden_size}, {spec.vocab_size} tokens in the vocabulary."
    )


def _scheme(method: Method) -> str:
    """What was asked for: ``INT4 g64``, ``3.5 bits a weight``."""
    if method.bits is None:
        return f"{method.target_bpw:g} bits a weight"
    return maps.scheme_name(method.bits, method.group)


def _figures(manifest: Manifest, scores: Scores | None) -> Iterator[Figure]:
    summary = manifest.summary
    if scores is not None:
        yield Figure("KL divergence", *with_error(scores.kl), "nats a token, from the original")
        same, error = scores.same_top1.mean, scores.same_top1.standard_error
        yield Figure("Same next token", f"{same:.1%}", f"{error:.1%}" if error else None, "most probable in both")
        both = scores.perplexity
        yield Figure("Perplexity", perplexity(both.artifact), None, f"the original: {perplexity(both.reference)}")
    yield Figure("Bits per weight", f"{summary.bits_per_weight:.2f}", None, "codes and scales")
    before = _weight_bytes(manifest.source.files)
    yield Figure("Weights", size(_weight_bytes(manifest.files)), None, f"the source: {size(before)}" if before else "")
    yield Figure("Weight cosine", cosine(summary.cosine), None, f"error {percent(summary.relative_error)}")


def _measured(quality: Quality, manifest: Manifest, parts: Parts) -> Measured:
    alone = tuple(
        Alone(parts.units[each.modules], each.bits, each.kl, _is_stored(each, manifest))
        for each in quality.sensitivity
        if each.modules in parts.units
    )
    by_unit: dict[Unit, dict[int, Alone]] = {}
    for each in alone:
        by_unit.setdefault(each.unit, {})[each.bits] = each
    ranked = sorted(by_unit.items(), key=lambda item: -item[1][min(item[1])].kl.mean)
    return Measured(
        spread=_spread(quality.scores),
        frontier=charts.frontier(quality, manifest.summary.bits_per_weight) if quality.frontier else None,
        panels=charts.sensitivity(alone, parts.layers),
        bits=tuple(sorted({each.bits for each in alone}, reverse=True)),
        sensitive=tuple(ranked[:_WORST]),
    )


def _is_stored(each: Sensitivity, manifest: Manifest) -> bool:
    """Whether the artifact has this unit in these bits."""
    entries = [manifest.quantized.get(name) for name in each.modules]
    return all(entry is not None and entry.bits == each.bits for entry in entries)


def _spread(scores: Scores) -> str:
    kl, (ratio, error) = scores.kl, with_error(scores.perplexity.log_ratio)
    sign = "+" if scores.perplexity.log_ratio.mean > 0 else ""
    return (
        f"KL divergence is below {number(kl.p50)} at half of the positions, below {number(kl.p90)} at 90%, below "
        f"{number(kl.p99)} at 99%, and {number(kl.max)} at most; ln(perplexity ratio) is {sign}{ratio}"
        + (f" ± {error}" if error else "")
        + f"; logit cosine is {cosine(scores.logit_cosine.mean)}, {cosine(scores.logit_cosine.least)} at least."
    )


def _by_layer(parts: Parts) -> tuple[tuple[str, ...], ...]:
    """Relative errors in percent, a row a layer."""
    text = {Empty.KEPT: "BF16", Empty.ABSENT: ""}
    cells = zip(*(kind.cells for kind in parts.kinds), strict=True)
    return tuple(
        tuple(number(100 * c.relative_error) if isinstance(c, ModuleReport) else text[c] for c in row) for row in cells
    )


def _settings(method: Method) -> Iterator[tuple[str, str]]:
    """Every field of the method that says something, whatever fields it has."""
    for name, value in msgspec.to_builtins(method).items():
        label = _LABELS.get(name, name.replace("_", " "))
        if isinstance(value, dict):
            yield label, ", ".join(f"{key}: {each}" for key, each in value.items())
        elif isinstance(value, (list, tuple)):
            if value:
                yield label, ", ".join(map(str, value))
        elif name == "group":
            yield label, str(value or "row")
        elif value is not None:
            yield label, str(value)
