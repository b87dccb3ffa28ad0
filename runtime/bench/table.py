"""Writes what was tuned into the table of a GPU: see ``fused.tables``."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import triton

from lbq.formats import json_file
from lbq.runtime.bench.context import Bench
from lbq.runtime.bench.tune import first_heads, step_weights
from lbq.runtime.fused.tables import Measured, MeasuredHeads, Table
from lbq.runtime.kernels.attention import Short


def table_of(bench: Bench) -> Table:
    """Every plan that ``bench`` found, as one table of its GPU."""
    made = f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, Triton {triton.__version__}"
    table = Table(_name(bench), _capability(bench), bench.sms, made)
    for model, plan in bench.best.items():
        decoder = model.decoder(bench.device, layers=1)
        heads = first_heads(decoder)
        measured = tuple(
            Measured(
                role,
                weight.n,
                weight.k,
                weight.bits,
                weight.group,
                how.tile.rows,
                how.tile.columns,
                how.tile.warps,
                how.apart,
                how.ahead,
                how.early,
                how.tile.rounds,
                how.lines,
                how.onward,
            )
            for role, weight in step_weights(decoder).items()
            for how in (plan.projecting(role, weight, bench.sms),)
        )
        split, short = plan.splitting(heads, bench.sms), plan.shortening(heads) or Short()
        eight, four = (plan.splitting(heads, bench.sms, kind) for kind in (torch.int8, torch.uint8))
        attention = MeasuredHeads(heads.kv_heads, heads.group, heads.dim, split, short, eight, four)
        table = table.merged(Table(table.gpu, table.capability, table.multiprocessors, made, measured, (attention,)))
    return table


def write_table(table: Table, path: Path) -> None:
    """Put ``table`` into ``path``, whose other entries stay."""
    if path.exists():
        table = json_file.read(path, Table).merged(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_file.encode(table))


def _name(bench: Bench) -> str:
    return "toy" if bench.toy else torch.cuda.get_device_name(bench.device)


def _capability(bench: Bench) -> tuple[int, int]:
    return (0, 0) if bench.toy else torch.cuda.get_device_capability(bench.device)
