"""Artifacts of models that two ranks can share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_weights import WIDTHS

from lbq.conversion import convert


@pytest.fixture(scope="session")
def make(write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make(family, **options)``: an artifact; each made once."""
    root = tmp_path_factory.mktemp("servers")
    made: dict[str, Path] = {}

    def run(family: str = "qwen3", **options: Any) -> Path:
        key = f"{family}-{'-'.join(map(str, options.values()))}"
        if key not in made:
            source = root / family
            if not source.exists():
                write_checkpoint(source, family, **WIDTHS, use_sliding_window=None)  # vLLM has no mixture of windows
            made[key] = convert(source, root / str(len(made)), device="cpu", **options).path
        return made[key]

    return run
