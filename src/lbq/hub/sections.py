"""lbq's part of a model card, as Markdown.

What comes from files is shown as text: it can neither end the part nor bring HTML.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePath

from lbq.formats.manifest import Import, Manifest, Method
from lbq.formats.quality import Divergence, Estimate, Quality
from lbq.formats.readers import VERSIONS, Fit, vllm_fit
from lbq.formats.report import Report
from lbq.formats.scheme import Scheme
from lbq.formats.wording import plain, size
from lbq.hub.names import MAIN, HubId, is_commit, parse_hub_id

_METHODS = {"rtn": "round to nearest"}
_MOST = 5  # schemes that are named


def section(manifest: Manifest, report: Report, hub_id: HubId, template: str | None) -> str:
    """What an artifact is, what it cost and how it is run from the Hub. ``template`` is its chat template."""
    parts = [
        _table("artifact", _facts(manifest, template)),
        "## What quantization cost",
        _table("against the original", _costs(manifest, report.quality)),
        _measured_on(report.quality),
        *_differences(manifest),
        "## How to run it",
        f"lbq:\n\n```\nlbq run {hub_id}\n```",
        _transformers(manifest, hub_id, chats=template is not None),
        _vllm(manifest, hub_id),
    ]
    return "\n\n".join(parts)


def as_text(content: str) -> str:
    """``content`` as Markdown that shows it and does nothing else."""
    return "".join(f"&#{ord(c)};" if c in "\\`*[]<>&|" else c for c in plain(content))


def as_code(content: str) -> str:
    """``content`` as code, which has no way to show some characters."""
    return "`" + plain(content).translate(str.maketrans("`|<>", "'¦‹›")) + "`"


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _facts(manifest: Manifest, template: str | None) -> Iterator[tuple[str, str]]:
    source, files = manifest.source, manifest.files
    name = as_text(source.name)
    if source.revision is not None and is_commit(source.revision) and parse_hub_id(source.name):
        name = f"[{source.name}](https://huggingface.co/{source.name}) at {as_code(source.revision[:12])}"
    yield "original", name
    yield "linear layers", _schemes(manifest)
    nbytes = sum(entry.size for entry in files.values())
    yield "size", f"{size(nbytes)}, {manifest.summary.bits_per_weight:.2f} bits a quantized weight"
    yield "method", _method(manifest.method)
    tools = ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())
    yield "made by", as_text(tools)
    yield "stored as", "compressed-tensors `pack-quantized`; `lbq.json` has sizes and hashes, for `lbq verify`"
    if template is not None:
        yield "chat template", f"sha256 `{hashlib.sha256(template.encode()).hexdigest()}`"


def _schemes(manifest: Manifest) -> str:
    layers = Counter(entry.scheme for entry in manifest.quantized.values())
    shown = [f"{_scheme(scheme)} ({count})" for scheme, count in layers.most_common(_MOST)]
    more = len(layers) - len(shown)
    linear = sum(1 for _ in manifest.spec.projections()) - len(manifest.quantized)
    rest = ([f"{more} more schemes"] if more else []) + ([f"BF16 ({linear})"] if linear else [])
    return ", ".join(shown + rest)


def _scheme(scheme: Scheme) -> str:
    return f"INT{scheme.bits} " + ("with a scale a row" if scheme.group is None else f"in groups of {scheme.group}")


def _method(method: Method) -> str:
    if isinstance(method, Import):
        return f"codes and scales of {as_text(method.origin)}" + (
            f", {method.requantized} layers requantized" if method.requantized else ""
        )
    return f"{_METHODS.get(method.name, as_text(method.name))}, {as_code(_settings(method))}"


def _settings(method: Method) -> str:
    """What was asked for, as options of ``lbq convert``."""
    words = [f"--bits {method.bits}"] if method.bits is not None else [f"--target-bpw {method.target_bpw:g}"]
    words.append(f"--gs {method.group or 'row'}")
    if method.lm_head is not None:
        words.append(f"--lm-head {method.lm_head}")
    words += [f"--keep {pattern}" for pattern in method.keep] + [f"--set {choice}" for choice in method.set]
    return " ".join(words + ([f"--for {','.join(method.readers)}"] if method.readers else []))


def _costs(manifest: Manifest, quality: Quality | None) -> Iterator[tuple[str, str]]:
    summary = manifest.summary
    yield "weight cosine", f"{summary.cosine:.5f}, worst layer {summary.worst_cosine:.5f}"
    yield "weight error", f"{summary.relative_error:.2%}"
    if quality is None:
        return
    scores = quality.scores
    yield "KL divergence", f"{_with_error(scores.kl, '.5f')} nats a token"
    yield "same most probable token", _with_error(scores.same_top1, ".2%")
    ours, theirs = scores.perplexity.artifact, scores.perplexity.reference
    if ours is not None and theirs is not None:
        yield "perplexity", f"{ours:.3f}, original {theirs:.3f}"


def _with_error(value: Estimate | Divergence, form: str) -> str:
    error = value.standard_error
    return f"{value.mean:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _measured_on(quality: Quality | None) -> str:
    if quality is None:
        return "Distributions of tokens were not measured: `lbq eval` does."
    text = quality.text
    return (
        f"Tokens at {text.positions} positions of {as_code(PurePath(text.path).name)} (sha256 `{text.sha256}`), "
        f"in windows of {text.context}."
    )


def _differences(manifest: Manifest) -> Iterator[str]:
    if manifest.notes:
        yield "What differs from the settings:"
        yield "\n".join(f"- {as_text(note)}" for note in manifest.notes)


def _transformers(manifest: Manifest, hub_id: HubId, *, chats: bool) -> str:
    threes = any(entry.bits == 3 for entry in manifest.quantized.values())
    package = "compressed-tensors 0.18 or newer" if threes else "compressed-tensors"
    where = f'"{hub_id.name}"' + ("" if hub_id.revision == MAIN else f', revision="{hub_id.revision}"')
    prompt = '[{"role": "user", "content": "Tell me about the sea."}]' if chats else '"The sea is"'
    answer = '["generated_text"][-1]["content"]' if chats else '["generated_text"]'
    return (
        f"transformers, with {package}; it unpacks the weights to 16 bits:\n\n```python\n"
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model={where})\n'
        f"print(generate({prompt}, max_new_tokens=40)[0]{answer})\n```"
    )


def _vllm(manifest: Manifest, hub_id: HubId) -> str:
    fits = list(_fits(manifest))
    if broken := [(name, fit) for name, fit in fits if not fit.runs]:
        name, fit = broken[0]
        return f"vLLM {VERSIONS['vLLM']} cannot run it: {as_code(name)}: {fit.text}."
    revision = "" if hub_id.revision == MAIN else f" --revision {hub_id.revision}"
    checked = f"checked with the loader of {VERSIONS['vLLM']}, not run on a GPU"
    text = f"vLLM ({checked}):\n\n```\nvllm serve {hub_id.name}{revision}\n```"
    slow = Counter(fit.text for _, fit in fits if not fit.fast)
    if slow:
        kernels = ", ".join(f"{kernel} ({count})" for kernel, count in slow.most_common())
        text += f"\n\nNot all of its layers get vLLM's fast kernels: {as_text(kernels)}."
    return text


def _fits(manifest: Manifest) -> Iterator[tuple[str, Fit]]:
    """What vLLM does with each fused unit that is quantised, by its first part's name."""
    for unit in manifest.spec.units():
        first = manifest.quantized.get(unit[0].name)
        if first is not None:
            yield unit[0].name, vllm_fit(sum(p.out_features for p in unit), first.k, first.scheme)
