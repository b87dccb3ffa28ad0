"""Model cards: what lbq says of an artifact, and what it leaves to its author."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from lbq.formats.errors import DataError
from lbq.formats.manifest import License, Manifest, read_manifest
from lbq.hub.card import card_of, differ_outside, metadata_of
from lbq.hub.names import HubId

pytestmark = pytest.mark.usefixtures("one_thread")

PLACE = HubId("me/tiny-int4")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Lbq = Callable[..., Any]


@pytest.fixture
def manifest(kept_artifact: Path) -> Manifest:
    """As if it had been converted from the Hub."""
    found = read_manifest(kept_artifact)
    source = msgspec.structs.replace(
        found.source, name="someone/tiny", revision=COMMIT, license=License("other", "tiny", "https://x/->")
    )
    return msgspec.structs.replace(found, source=source)


def parts(card: str) -> tuple[dict[str, object], str]:
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    return yaml.safe_load(head), body


def test_a_new_card(kept_artifact: Path, manifest: Manifest) -> None:
    card = card_of(kept_artifact, manifest, PLACE, None)
    metadata, body = parts(card)
    assert metadata == {
        "license": "other",
        "license_name": "tiny",
        "license_link": "https://x/->",
        "base_model": "someone/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lbq", "int4", "compressed-tensors"],
    }
    assert body.startswith("# tiny-int4\n\n<!-- lbq:begin")
    assert body.endswith("<!-- lbq:end -->\n")
    assert "[someone/tiny](https://huggingface.co/someone/tiny) at `0123456789ab`" in body
    assert "`--bits 4 --gs 32 --lm-head 8`" in body
    assert manifest.files["chat_template.jinja"].sha256 in body
    assert f"| weight cosine | {manifest.summary.cosine:.5f}" in body
    assert "lbq run me/tiny-int4\n" in body
    assert card_of(kept_artifact, manifest, PLACE, card) == card


def test_a_branch_is_run_as_a_branch(kept_artifact: Path, manifest: Manifest) -> None:
    card = card_of(kept_artifact, manifest, HubId("me/tiny", "v2"), None)
    assert "lbq run me/tiny@v2\n" in card
    assert 'model="me/tiny", revision="v2")' in card


def test_what_the_author_wrote_stays(kept_artifact: Path, manifest: Manifest) -> None:
    theirs = "---\n# mine\nlicense: mit\ntags: [sea, 'lbq']\nlanguage: en\nbase_model: other/base\n---\nMy words.\n"
    card = card_of(kept_artifact, manifest, PLACE, theirs)
    metadata, body = parts(card)
    assert {key: metadata[key] for key in ("license", "language", "base_model")} == {
        "license": "mit",
        "language": "en",
        "base_model": "other/base",
    }
    assert metadata["tags"] == ["sea", "lbq", "int4", "compressed-tensors"]
    assert body.startswith("My words.\n\n<!-- lbq:begin")
    edited = card.replace("My words.", "Other words.").replace("- int4\n", "- mine\n") + "\nAfterwards.\n"
    edited = edited.replace("pipeline_tag: text-generation\n", "")
    again = card_of(kept_artifact, manifest, PLACE, edited)
    metadata, body = parts(again)
    assert metadata["tags"] == ["sea", "lbq", "mine", "compressed-tensors"]
    assert "pipeline_tag" not in metadata
    assert body.startswith("Other words.\n\n<!-- lbq:begin")
    assert body.endswith("<!-- lbq:end -->\n\nAfterwards.\n")
    assert card_of(kept_artifact, manifest, PLACE, again) == again
    assert not differ_outside(card, card.replace("| weight error |", "| error |"))
    assert differ_outside(card, edited)


def test_what_lbq_wrote_follows_the_artifact(kept_artifact: Path, manifest: Manifest) -> None:
    first = card_of(kept_artifact, manifest, PLACE, None)
    method = msgspec.structs.replace(manifest.method, bits=8)
    source = msgspec.structs.replace(manifest.source, name="a-folder", revision=None, license=License("mit"))
    other = msgspec.structs.replace(manifest, method=method, source=source)
    metadata, _ = parts(card_of(kept_artifact, other, PLACE, first))
    assert metadata == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lbq", "compressed-tensors", "int8"],
    }
    assert parts(card_of(kept_artifact, other, PLACE, None))[0] == metadata_of(other)


def test_yaml_of_the_author_is_not_written_anew(kept_artifact: Path, manifest: Manifest) -> None:
    card = card_of(kept_artifact, manifest, PLACE, None).replace("---\n", "---\n# a comment\n", 1)
    assert card_of(kept_artifact, manifest, PLACE, card) == card


@pytest.mark.parametrize(
    "text",
    [
        "<!-- lbq:begin -->",
        "<!-- lbq:end --> <!-- lbq:begin -->",
        "<!-- lbq:begin --><!-- lbq:end --><!-- lbq:begin --><!-- lbq:end -->",
        "---\na: [\n---\n",
    ],
)
def test_cards_that_cannot_be_edited(kept_artifact: Path, manifest: Manifest, text: str) -> None:
    with pytest.raises(DataError, match=r"README\.md"):
        card_of(kept_artifact, manifest, PLACE, text)


def test_marks_whose_comment_is_gone(kept_artifact: Path, manifest: Manifest) -> None:
    """Without it all metadata are the author's."""
    text = "---\nlicense: mit\n---\n<!-- lbq:begin -->old<!-- lbq:metadata {broken} --><!-- lbq:end -->rest"
    metadata, body = parts(card_of(kept_artifact, manifest, PLACE, text))
    assert metadata["license"] == "mit"
    assert "old" not in body
    assert body.endswith("<!-- lbq:end -->\nrest")


def test_hostile_words_end_no_section(kept_artifact: Path, manifest: Manifest) -> None:
    evil = "<!-- lbq:end --> <script>|`x`\n# Title"
    method = msgspec.structs.replace(manifest.method, keep=(evil,))
    source = msgspec.structs.replace(manifest.source, name=evil, license=License(evil))
    hostile = msgspec.structs.replace(manifest, method=method, source=source, notes=(evil,), tools={evil: evil})
    card = card_of(kept_artifact, hostile, PLACE, None)
    _, body = parts(card)
    assert "<script" not in body
    assert re.findall(r"<!-- lbq:\w+", body) == ["<!-- lbq:begin", "<!-- lbq:metadata", "<!-- lbq:end"]
    assert card_of(kept_artifact, hostile, PLACE, card) == card


def test_transformers_runs_the_code_of_the_card(kept_artifact: Path, manifest: Manifest) -> None:
    card = card_of(kept_artifact, manifest, PLACE, None)
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program.replace("me/tiny-int4", str(kept_artifact)), {})
    assert out.getvalue()


def test_the_command(lbq: Lbq, kept_artifact: Path, artifact: Path) -> None:
    done = lbq("card", kept_artifact, "me/tiny")
    assert (done.code, done.err) == (0, "")
    assert parts(done.out)[1].startswith("# tiny\n")
    (artifact / "README.md").write_text("# My own\n")
    assert "# My own\n\n<!-- lbq:begin" in lbq("card", artifact).out
    (artifact / "README.md").write_bytes(b"\xff")
    done = lbq("card", artifact)
    assert (done.code, "README.md: not UTF-8 at byte 0" in done.error) == (3, True)
    assert lbq("card", artifact, "typo").code == 2
