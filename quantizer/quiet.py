"""Other packages without what they print."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("autoround", "transformers", "datasets", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, these packages neither log nor warn: they tell of what they chose for themselves, which lbq has chosen,
    and what goes wrong is raised."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)  # also that of the loggers below it
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
