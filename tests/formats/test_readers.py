"""What is said of vLLM and SGLang: the module and the document say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lbq.formats.packing import BITS, GROUPS
from lbq.formats.readers import FAST_GROUP, MATRIX, VERSIONS, Cell, Fit, cell, sglang_fit, vllm_fit
from lbq.formats.scheme import Scheme

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
    for label, _, vllm, hopper, sglang in rows("Who reads what"):
        if label.startswith("INT"):
            widths, _, which = label.partition(" · ")
            found.append(Cell(tuple(map(int, re.findall(r"\d", widths))), groups(which), vllm, hopper, sglang))
    assert tuple(found) == MATRIX


def test_the_versions_are_those_of_the_document() -> None:
    stated = {row[0]: row[1] for row in rows("The artifact")}
    assert {tool: stated[tool] for tool in VERSIONS} == VERSIONS


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, *GROUPS])
def test_every_scheme_is_there_once(bits: int, group: int | None) -> None:
    assert [c for c in MATRIX if bits in c.bits and group in c.groups] == [cell(bits, group)]
    fits = vllm_fit(4096, 4096, Scheme(bits, group)), sglang_fit(4096, 4096, Scheme(bits, group))
    assert [fit.fast for fit in fits] == [bits != 3 and (group is None or group <= FAST_GROUP)] * 2
    assert fits[0].runs
    assert fits[1].runs == fits[1].fast


NO_SHAPE = (False, False, "no kernel for the shape: loads, fails at the first product")
NO_GROUP = (False, False, "no kernel: loads, fails at the first product")
REFUSED = (False, False, "no kernel: refuses at start")
MARLIN = (True, True, "Marlin")
MACHETE = (True, True, "Marlin (Hopper: Machete)")


@pytest.mark.parametrize(
    ("n", "k", "scheme", "vllm", "sglang"),
    [
        (960, 576, Scheme(4, 64), (True, False, "Marlin, padded (Hopper: Humming)"), NO_SHAPE),
        (1152, 896, Scheme(4, 128), MACHETE, MARLIN),
        (1152, 896, Scheme(4, 32), (True, True, "Marlin (Hopper: Humming)"), MARLIN),
        (64, 1024, Scheme(8, None), (True, True, "Marlin (Hopper: Humming)"), MARLIN),
        (1152, 1024, Scheme(4, 256), (True, False, "Triton (Hopper: Humming)"), NO_GROUP),
        (1151, 1024, Scheme(4, 256), (True, False, "Humming"), NO_GROUP),
        (128, 1024, Scheme(3, 128), (True, False, "Humming"), REFUSED),
        (128, 33, Scheme(3, None), (False, False, "no kernel: inputs are not a multiple of 32"), REFUSED),
        (128, 33, Scheme(4, None), (False, False, "no kernel: inputs are not a multiple of 8"), NO_SHAPE),
    ],
)
def test_shapes(n: int, k: int, scheme: Scheme, vllm: tuple[bool, bool, str], sglang: tuple[bool, bool, str]) -> None:
    assert vllm_fit(n, k, scheme) == Fit(*vllm)
    assert sglang_fit(n, k, scheme) == Fit(*sglang)
