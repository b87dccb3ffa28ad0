"""The runtime: maps an artifact and decodes it. Needs neither the quantizer nor transformers.

Importing this package is cheap: torch is loaded when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lbq.runtime.loading import load
    from lbq.runtime.model import Model
    from lbq.runtime.text.result import Result, TextStream

__all__ = ["Model", "Result", "TextStream", "load"]

_HOMES = {
    "Model": "lbq.runtime.model",
    "Result": "lbq.runtime.text.result",
    "TextStream": "lbq.runtime.text.result",
    "load": "lbq.runtime.loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
