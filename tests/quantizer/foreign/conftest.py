"""A checkpoint, and what AutoRound makes of it in every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Export = Callable[..., Path]


@pytest.fixture(scope="session")
def source(write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("autoround") / "source", "qwen2", num_hidden_layers=1, tie_word_embeddings=False
    )


@pytest.fixture(scope="session")
def export(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """``export(format, bits, group, sym)``: rounded to nearest by AutoRound; each made once."""
    made: dict[str, Path] = {}

    def run(form: str, bits: int = 4, group: int = 32, sym: bool = True, **options: object) -> Path:
        key = repr((form, bits, group, sym, options))
        if key not in made:
            from auto_round import AutoRound

            out = tmp_path_factory.mktemp("export")
            settings = {
                "bits": bits,
                "group_size": group,
                "sym": sym,
                "iters": 0,
                "nsamples": 1,
                "seqlen": 16,
                **options,
            }
            tool = AutoRound(str(source), device_map="cpu", disable_model_free=True, disable_opt_rtn=True, **settings)
            tool.quantize_and_save(str(out), format=form)
            made[key] = next(path.parent for path in out.rglob("config.json"))
        return made[key]

    return run
