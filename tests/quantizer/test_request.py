"""What a user may ask for."""

from __future__ import annotations

import pytest

from lbq.formats.errors import UsageError
from lbq.formats.scheme import Scheme
from lbq.quantizer.request import Override, make_request, matches, scheme

DOWN = "model.layers.11.mlp.down_proj"


@pytest.mark.parametrize(
    ("bits", "group", "expected"),
    [
        (8, None, Scheme(8, None)),
        (4, None, Scheme(4, 128)),
        (3, None, Scheme(3, 128)),
        (4, "row", Scheme(4, None)),
        (4, "256", Scheme(4, 256)),
        (8, 32, Scheme(8, 32)),
    ],
)
def test_scheme(bits: int, group: int | str | None, expected: Scheme) -> None:
    assert scheme(bits, group) == expected


@pytest.mark.parametrize("bits", [5, 0, -4, 16])
def test_bits_that_do_not_exist(bits: int) -> None:
    with pytest.raises(UsageError, match=f"{bits} bits are not supported: 3, 4, 8 are"):
        make_request(bits)


@pytest.mark.parametrize("group", [0, -7, "0", "-7", "16", "96", "1024", "", "rows", "1e2", "9" * 5000])
def test_groups_that_do_not_exist(group: int | str) -> None:
    with pytest.raises(UsageError, match="not supported: 32, 64, 128, 256, 512 and row are"):
        make_request(4, group)


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("down_proj=8", "down_proj", Scheme(8, None)),
        ("down_proj=4", "down_proj", Scheme(4, 64)),
        ("layers.0=8:128", "layers.0", Scheme(8, 128)),
        ("layers.[0-3].mlp=3:row", "layers.[0-3].mlp", Scheme(3, None)),
        ("a=b=8", "a=b", Scheme(8, None)),
    ],
)
def test_override(text: str, pattern: str, expected: Scheme) -> None:
    assert Override.parse(text, Scheme(4, 64)) == Override(pattern, expected, text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "=", "=8", "down_proj", "down_proj=", "down_proj=x", "down_proj=8:", "down_proj=8:x", "d=-8", "d=8:-7"),
        *("d=5", "d=8:0", "d=8:100", "d=٨", "d=8 ", "d=" + "8" * 5000),
    ],
)
def test_bad_override(text: str) -> None:
    with pytest.raises(UsageError):
        make_request(4, overrides=[text])


@pytest.mark.parametrize(
    "changes",
    [{"lm_head": 5}, {"lm_head": 3}, {"readers": ["llama.cpp"]}, {"readers": [""]}, {"max_shard_bytes": 0}],
)
def test_bad_settings(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        make_request(4, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pattern", ["down_proj", "layers.11", "mlp", "layers.1[0-3].mlp", "*_proj", DOWN, "*", "model.*.mlp.down_proj"]
)
def test_matches(pattern: str) -> None:
    assert matches(pattern, DOWN)


@pytest.mark.parametrize(
    "pattern", ["", "layers.1", "down", "proj", "layer", "layers.[0-3]", "DOWN_PROJ", "down_proj."]
)
def test_does_not_match(pattern: str) -> None:
    assert not matches(pattern, DOWN)


def test_an_override_beside_eight_bits_has_the_default_group() -> None:
    assert Override.parse("down_proj=4", Scheme(8, None)).scheme == Scheme(4, 128)
