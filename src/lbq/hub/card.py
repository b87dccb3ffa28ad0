"""The model card (README.md): what an artifact is, what it cost and how it is run, between the user's own words.

lbq writes what stands between its two marks anew at every push, and of the metadata at the head only what it wrote
itself: a comment between the marks keeps what that was. All else stays as its author left it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from lbq.formats import json_file
from lbq.formats.errors import DataError
from lbq.formats.front_matter import Card, format_card, parse_card
from lbq.formats.manifest import Manifest
from lbq.formats.report import report_of
from lbq.hub.names import HubId, is_commit, parse_hub_id
from lbq.hub.sections import section
from lbq.runtime.text.chat import ChatTemplate

README = "README.md"
_MOST_BYTES = 4 << 20
_BEGIN = "<!-- lbq:begin: lbq push writes what follows anew, up to its end; write outside of it -->"
_END = "<!-- lbq:end -->"
_MARKS = re.compile(r"<!--\s*lbq:(begin|end)\b.*?-->", re.DOTALL)
_METADATA = re.compile(r"<!-- lbq:metadata (\{.*?\}) -->")

Metadata = dict[str, object]


def card_of(folder: Path, manifest: Manifest, hub_id: HubId, existing: str | None) -> str:
    """The card of the artifact in ``folder`` for a place on the Hub, made into an existing one where there is one.

    Raises DataError for an existing card whose metadata or marks cannot be read, and for a broken report.
    """
    template = ChatTemplate.load(folder)
    body = section(manifest, report_of(folder, manifest), hub_id, template.source if template else None)
    ours = metadata_of(manifest)
    if existing is None:
        existing = f"# {hub_id.name.rpartition('/')[2]}\n"
    card = parse_card(existing, README)
    before, old, after = _split(card.text)
    if before and not before.endswith("\n\n"):
        before = before.rstrip("\n") + "\n\n"
    text = f"{before}{_BEGIN}\n\n{body}\n\n<!-- lbq:metadata {_in_comment(ours)} -->\n{_END}\n{after}"
    metadata = _merged(card.metadata, _last_written(old), ours)
    if metadata == card.metadata:  # the author's own YAML, comments and all
        return existing.removesuffix(card.text) + text
    return format_card(Card(metadata, text))


def differ_outside(one: str, other: str) -> bool:
    """Whether two cards differ in what is not lbq's."""

    def own(content: str) -> tuple[str, Metadata]:
        card = parse_card(content, README)
        before, section, after = _split(card.text)
        written = _last_written(section)
        return before.strip() + after.strip(), {k: v for k, v in card.metadata.items() if written.get(k) != v}

    return own(one) != own(other)


def metadata_of(manifest: Manifest) -> Metadata:
    """What the Hub shall know of an artifact; of the source what lbq knows."""
    source, found = manifest.source, Metadata()
    if source.license is not None:
        words = {"license": source.license.id, "license_name": source.license.name, "license_link": source.license.link}
        found |= {key: value for key, value in words.items() if value is not None}
    if source.revision is not None and is_commit(source.revision) and parse_hub_id(source.name) is not None:
        found |= {"base_model": source.name, "base_model_relation": "quantized"}
    bits = manifest.method.bits
    width = "mixed-precision" if bits is None else f"int{bits}"
    return {
        **found,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lbq", width, "compressed-tensors"],
    }


def read_card(path: Path) -> str:
    """A README.md as text. Raises DataError for what is not UTF-8 or too long, StorageError where it cannot be read."""
    try:
        return json_file.read_bytes(path, _MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None


def _split(text: str) -> tuple[str, str, str]:
    """What stands before, between and after the marks; all of it before them where there are none."""
    marks = list(_MARKS.finditer(text))
    kinds = [mark[1] for mark in marks]
    if not kinds:
        return text, "", ""
    if kinds != ["begin", "end"]:
        raise DataError(f"{README}: needs one <!-- lbq:begin --> and after it one <!-- lbq:end -->, or neither")
    begin, end = marks
    return text[: begin.start()], text[begin.end() : end.start()], text[end.end() :].removeprefix("\n")


def _last_written(section: str) -> Metadata:
    """The metadata that lbq wrote last; none where the comment that keeps them is gone."""
    found = _METADATA.search(section)
    try:
        return msgspec.json.decode(found[1], type=Metadata) if found else {}
    except msgspec.DecodeError:
        return {}


def _in_comment(metadata: Metadata) -> str:
    """JSON that neither ends the comment nor begins one."""
    return msgspec.json.encode(metadata).decode().replace("<", "\\u003c").replace(">", "\\u003e")


def _merged(present: Mapping[str, object], last: Metadata, ours: Metadata) -> Metadata:
    """``present`` with lbq's values where nobody set others: what was changed or removed by hand stays so."""
    merged = dict(present)
    for key in last.keys() - ours.keys():
        if merged.get(key) == last[key]:
            del merged[key]
    for key, value in ours.items():
        if key == "tags":
            if tags := _merged_tags(_tags(present), _tags(last), _tags(ours)):
                merged[key] = tags
        elif merged.get(key) == last.get(key):  # as lbq left it, or never there
            merged[key] = value
    return merged


def _tags(metadata: Mapping[str, object]) -> list[object]:
    found = metadata.get("tags", [])
    return list(found) if isinstance(found, list) else [found]


def _merged_tags(present: list[object], last: list[object], ours: list[object]) -> list[object]:
    kept = [tag for tag in present if tag in ours or tag not in last]
    return kept + [tag for tag in ours if tag not in present and tag not in last]
