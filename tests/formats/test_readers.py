"""What is said of vLLM and SGLang: the module and the document say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lbq.formats.packing import BITS, GROUPS
from lbq.formats.readers import MATRIX, VERSIONS, Cell, cell, sglang_fit, vllm_fit
from lbq.formats.scheme import Scheme
from lbq.quantizer.request import READERS_GROUP

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Every row of the tables below a heading."""
    text = DOCUMENT.partition(f"# {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def groups(text: str) -> tuple[int | None, ...]:
    if text == "any group, row":
        return (*GROUPS, None)
    return tuple(None if group == "row" else int(group.removeprefix("g")) for group in text.split(", "))


def test_the_matrix_is_that_of_the_document() -> None:
    found = []
    for label, _, vllm, sglang in rows("Who reads what"):
        if label.startswith("INT"):
            widths, _, which = label.partition(" · ")
            found.append(Cell(tuple(map(int, re.findall(r"\d", widths))), groups(which), vllm, sglang))
    assert tuple(found) == MATRIX


def test_the_versions_are_those_of_the_document() -> None:
    stated = {row[0]: row[1] for row in rows("The artifact")}
    assert {tool: stated[tool] for tool in VERSIONS} == VERSIONS


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, *GROUPS])
def test_every_scheme_is_there_once(bits: int, group: int | None) -> None:
    assert [c for c in MATRIX if bits in c.bits and group in c.groups] == [cell(bits, group)]
    fits = vllm_fit(4096, 4096, Scheme(bits, group)), sglang_fit(4096, 4096, Scheme(bits, group))
    assert [fit.fast for fit in fits] == [bits != 3 and (group is None or group <= READERS_GROUP)] * 2
    assert fits[0].runs
    assert fits[1].runs == fits[1].fast


@pytest.mark.parametrize(
    ("n", "k", "scheme", "vllm", "sglang"),
    [
        (960, 576, Scheme(4, 64), (True, False, "Marlin, padded"), (False, False, "none: no tiles")),
        (1152, 896, Scheme(4, 128), (True, True, "Machete, Marlin"), (True, True, "Marlin")),
        (1152, 896, Scheme(4, 32), (True, True, "Marlin"), (True, True, "Marlin")),
        (64, 1024, Scheme(8, None), (True, True, "Marlin"), (True, True, "Marlin")),
        (1152, 1024, Scheme(4, 256), (True, False, "Triton"), (False, False, "none: loads, fails")),
        (1151, 1024, Scheme(4, 256), (True, False, "Humming"), (False, False, "none: loads, fails")),
        (128, 1024, Scheme(3, 128), (True, False, "Humming"), (False, False, "none: refuses at start")),
        (128, 33, Scheme(3, None), (False, False, "none: K is not a multiple of 32"), (False, False, "none: refuses")),
        (128, 33, Scheme(4, None), (False, False, "none: K is not a multiple of 8"), (False, False, "none: no tiles")),
    ],
)
def test_shapes(n: int, k: int, scheme: Scheme, vllm: tuple[bool, bool, str], sglang: tuple[bool, bool, str]) -> None:
    for fit, (runs, fast, text) in ((vllm_fit(n, k, scheme), vllm), (sglang_fit(n, k, scheme), sglang)):
        assert (fit.runs, fit.fast) == (runs, fast)
        assert fit.text.startswith(text)
