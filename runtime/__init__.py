"""The runtime: maps an artifact and decodes it. Needs neither the quantizer nor transformers.

Importing this package is cheap: torch is loaded when a name below is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lbq.runtime.model import Model, Result, TextStream, load

__all__ = ["Model", "Result", "TextStream", "load"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lbq.runtime import model

    return getattr(model, name)
