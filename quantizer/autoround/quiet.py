"""auto-round and transformers without what they print."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("autoround", "transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, neither logs below an error nor warns. auto-round logs what it chose for itself, which lbq has chosen."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = [logger.disabled for logger in loggers]
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, before in zip(loggers, disabled, strict=True):
                logger.disabled = before
