"""lbq: quantize language models offline, then decode them at memory speed.

    from lbq import convert, load

    convert("HuggingFaceTB/SmolLM2-135M-Instruct", bits=4, group=256)
    print(load("SmolLM2-135M-Instruct-int4-g256").generate("What is the capital of France?").text)

Names are imported when they are first used: the quantizer and the runtime do not load one another.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lbq.conversion import convert
    from lbq.evaluation import compare, evaluate
    from lbq.evaluation.sweep import sweep
    from lbq.loading import load
    from lbq.quantizer.foreign.importing import import_checkpoint

__all__ = ["__version__", "compare", "convert", "evaluate", "import_checkpoint", "load", "sweep"]

__version__ = "0.1.0"

_HOMES = {
    "compare": "lbq.evaluation",
    "convert": "lbq.conversion",
    "evaluate": "lbq.evaluation",
    "import_checkpoint": "lbq.quantizer.foreign.importing",
    "load": "lbq.loading",
    "sweep": "lbq.evaluation.sweep",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'lbq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
