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
    before = [(logger.disabled, logger.level) for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True  # a level would not do: auto-round sets its own when it is imported
            logger.setLevel(logging.CRITICAL + 1)  # for the loggers below it
        try:
            yield
        finally:
            for logger, (disabled, level) in zip(loggers, before, strict=True):
                logger.disabled = disabled
                logger.setLevel(level)
