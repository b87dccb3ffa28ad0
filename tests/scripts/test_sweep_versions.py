"""scripts/sweep_versions.py with the versions that are installed, which are among those of docs/interop.md."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def table() -> dict[tuple[str, str], str]:
    """(transformers, compressed-tensors) → bits, as the document has them."""
    text = (ROOT / "docs" / "interop.md").read_text().partition("\n## transformers\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {(row[0], pack): bits for row in rows[2:] for pack, bits in zip(rows[0][1:], row[1:], strict=True)}


@pytest.mark.filterwarnings("ignore")
def test_the_installed_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every width loads, computes to the last bit what its plain counterpart does, and generates the same."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("sweep_versions")
    models = script.make_models(tmp_path / "models")
    (empty := tmp_path / "empty").mkdir()
    found = script.load(Path(sys.executable), empty, models)
    assert {bits: outcome.says for bits, outcome in found.items() if not outcome.passed} == {}
    models[8] = (models[4][0], models[8][1])  # weights that are not the codes'
    assert [bits for bits, outcome in script.load(Path(sys.executable), empty, models).items() if outcome.passed] == [
        bits for bits in models if bits != 8
    ]
    pair = version("transformers"), version("compressed-tensors")
    assert table().get(pair, "3, 4, 8") == "3, 4, 8"


def test_the_table_names_what_cannot_read_three_bits() -> None:
    for (_, pack), bits in table().items():
        old = tuple(map(int, pack.split(".")[:2])) < (0, 18)
        assert bits == ("4, 8" if old else "3, 4, 8")
