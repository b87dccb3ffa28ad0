"""JSON is decoded strictly, and a key twice is refused wherever it is."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbq.formats import json_file
from lbq.formats.errors import DataError, StorageError
from lbq.formats.manifest import read_manifest
from lbq.formats.report import read_report
from lbq.quantizer.families import read_spec


class Some(msgspec.Struct):
    a: int = 0


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"a":1,"a":2}', "a"),
        ('{"a":1,"b":2,"\\u0061":2}', "a"),
        ('{"b":{"c":[{"x":1},{"x":1, "x" \t\n:1}]}}', "x"),  # in what Some skips
        ('{"b":{"c":1},"d":"}{","b":1}', "b"),
        ('{"é":1,"\\u00e9":1}', "é"),
        ('{"":1,"":1}', ""),
        ('{"\\\\\\"":1,"\\u005c\\u0022":1}', '\\"'),
    ],
)
def test_a_key_twice(text: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json: .* appears twice") as caught:
        json_file.read(tmp_path / "x.json", Some)
    assert f": {key!r} appears" in str(caught.value)


VALUES = st.recursive(
    st.none() | st.integers(0, 9) | st.text(alphabet='a{}":,\\[]é \n', max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='ab{}":\\é', max_size=2), inner, max_size=3)
    ),
)


@settings(deadline=None)
@given(value=VALUES, ascii=st.booleans(), indent=st.sampled_from([None, 1]))
def test_keys_once_are_accepted(value: Any, ascii: bool, indent: int | None) -> None:
    """Whatever strings look like, and the same key in several objects."""
    text = json.dumps([value, value, {"a": value}], ensure_ascii=ascii, indent=indent).encode()
    assert json_file.decode(text, list[object], "x") == json.loads(text)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"b":' * 10**6, '{"a":1', "", '{"a":"x"}', "{}}", '{"a":1}"'],
    ids=lambda text: text[:8],
)
def test_malformed(text: str) -> None:
    with pytest.raises(DataError, match=r"^here: "):
        json_file.decode(text.encode(), Some, "here")


def test_what_is_skipped_costs_no_memory() -> None:
    data = b'{"b":[' + b"{},[]," * 10**5 + b"1]}"
    tracemalloc.start()
    try:
        assert json_file.decode(data, Some, "x") == Some()
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def double(path: Path, key: str) -> None:
    """Write the first ``"key": value`` twice."""
    path.write_text(re.sub(rf'("{key}": *[^,\s]+)', r"\1, \1", path.read_text(), count=1))


def test_manifest_report_and_config(artifact: Path) -> None:
    for name, key, read in (
        ("config.json", "hidden_size", read_spec),
        ("lbq.json", "sha256", read_manifest),
        ("lbq.json", "lbq_format", read_manifest),
        ("report.json", "cosine", read_report),
    ):
        double(artifact / name, key)
        with pytest.raises(DataError, match=f"{name}: '{key}' appears twice"):
            read(artifact)


def test_version_of_the_report(artifact: Path) -> None:
    path = artifact / "report.json"
    modules = read_report(artifact).modules
    assert [module.name for module in modules] == list(read_manifest(artifact).quantized)
    path.write_text('{"report_format": 2, "rows": []}')
    with pytest.raises(DataError, match=r"report\.json: format version 2; this lbq reads version 1: upgrade lbq"):
        read_report(artifact)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"report\.json"):
        read_report(artifact)
    path.unlink()
    with pytest.raises(StorageError, match=r"report\.json"):
        read_report(artifact)
