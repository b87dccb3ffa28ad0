"""Tables of what was measured, and the rule where they say nothing."""

from __future__ import annotations

import msgspec
import pytest
import torch

from lbq.formats.errors import DataError
from lbq.runtime.fused import tables
from lbq.runtime.fused.plan import ROLES, Plan
from lbq.runtime.fused.tables import Measured, MeasuredHeads, Table, path_of, shipped, table_for
from lbq.runtime.kernels.attention import Heads, Short, Split
from lbq.runtime.kernels.gemv import ArrangedWeight, Tile

HEADS = Heads(8, 4, 128, 128, 0.1)
TABLE = Table(
    "Some GPU",
    (8, 6),
    28,
    "yesterday",
    (
        Measured("down", 4096, 14336, 4, 256, 4, 256, 2, apart=True, ahead=False, early=2),
        Measured("down", 4096, 14336, 4, 128, 2, 128, 1, apart=False, ahead=True),
        Measured("qkv", 6144, 4096, 4, 256, 4, 512, 4, apart=False, ahead=False),
        Measured("qkv", 6144, 4096, 3, 256, 2, 128, 1, apart=False, ahead=True, rounds=4, lines=2),
    ),
    (MeasuredHeads(8, 4, 128, Split(16, 128, 128, 3, 8), Short(512, 64, 4)),),
)


def weight(n: int, k: int, bits: int = 4, group: int = 256) -> ArrangedWeight:
    """Without memory."""
    words = torch.empty((n, 3, k // 32) if bits == 3 else (n, k * bits // 32), dtype=torch.int32, device="meta")
    return ArrangedWeight(words, torch.empty((n, k // group), device="meta"), bits, group, k)


def test_what_was_measured_is_used():
    plan = Plan(table=TABLE)
    how = plan.projecting("down", weight(4096, 14336), 28)
    assert (how.tile, how.apart, how.ahead, how.early) == (Tile(4, 256, 2), True, False, 2)
    assert plan.projecting("down", weight(4096, 14336, group=128), 28).tile == Tile(2, 128, 1)
    assert plan.origin("down", weight(4096, 14336)) == "measured on Some GPU"
    how = plan.projecting("qkv", weight(6144, 4096, bits=3), 28)
    assert (how.tile, how.ahead, how.lines, how.outputs("qkv")) == (Tile(2, 128, 1, 4), True, 2, 8)
    assert plan.splitting(HEADS, 28) == Split(16, 128, 128, 3, 8)
    assert plan.shortening(HEADS) == Short(512, 64, 4)
    chosen = plan.with_role("down", plan.projecting("qkv", weight(6144, 4096), 28))
    assert chosen.origin("down", weight(4096, 14336)) == "chosen"


def test_a_shape_near_one_that_was_measured():
    plan = Plan(table=TABLE)
    assert plan.projecting("down", weight(4096, 12288), 28).tile == Tile(4, 256, 2)
    assert plan.origin("down", weight(4096, 12288)) == "measured on Some GPU, at 4096×14336"
    for other in (weight(1024, 3072), weight(4096, 14336, bits=3), weight(4096, 512)):
        assert plan.origin("down", other) is None
        assert plan.projecting("down", other, 28) == Plan().projecting("down", other, 28)
    assert plan.origin("qkv", weight(6144, 5120, bits=3)) is None  # rows longer than the tile that holds them whole
    assert plan.splitting(Heads(2, 7, 64, 64, 0.1), 28) == Plan().splitting(Heads(2, 7, 64, 64, 0.1), 28)


@pytest.mark.parametrize("sms", [16, 132])
def test_the_rule_suits_every_shape(sms):
    for n, k, bits in [(576, 576, 8), (64, 192, 3), (28672, 4096, 4), (128256, 4096, 8), (40, 2048, 4)]:
        for role in ROLES:
            how = Plan().projecting(role, weight(2 * n if role == "gate_up" else n, k, bits, 64), sms)
            assert how.outputs(role) >= 1
            assert how.tile.columns < 2 * k * bits // 32 or how.tile.columns <= 64


def test_the_table_of_a_gpu():
    assert [table.gpu for table in shipped()] == ["NVIDIA H200"]
    table = table_for("NVIDIA H200", (9, 0), 132)
    assert table is not None
    assert table_for("NVIDIA H100 80GB HBM3", (9, 0), 132) is table  # the same chip
    assert table_for("NVIDIA H100 PCIe", (9, 0), 114) is None
    assert path_of("NVIDIA H200").name == "nvidia-h200.json"
    for entry in table.projections:
        assert entry.role in ROLES
        assert entry.early in (1, 2)
        assert Plan(table=table).knows(entry.role, weight(entry.n, entry.k, entry.bits, entry.group))
        assert entry.tile.columns < 64 * 2**20  # a tile that there is


def test_merged_tables_keep_what_only_one_has():
    newer = msgspec.structs.replace(
        TABLE,
        made="today",
        projections=(msgspec.structs.replace(TABLE.projections[0], rows=8),),
        attention=(MeasuredHeads(8, 2, 128, Split(1), Short()),),
    )
    merged = TABLE.merged(newer)
    assert (merged.made, len(merged.projections), len(merged.attention)) == ("today", 4, 2)
    assert merged.projection("down", weight(4096, 14336)).rows == 8
    assert merged.merged(newer) == merged


def test_a_file_that_is_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    (tmp_path / "odd.json").write_text('{"gpu": "odd"}')
    shipped.cache_clear()
    with pytest.raises(DataError, match=r"odd\.json"):
        shipped()
    monkeypatch.undo()
    shipped.cache_clear()
