"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lbq.quantizer.request import Request


@dataclass(frozen=True)
class Wish:
    """What a command line asks weights to be quantized to, as it was given."""

    bits: int | None
    group: str | None
    lm_head: int | None
    keep: tuple[str, ...]
    overrides: tuple[str, ...]
    revision: str | None

    @property
    def given(self) -> bool:
        """Whether anything was asked for that quantizes, where nothing has to be."""
        return self != Wish(None, None, None, (), (), self.revision)

    def request(self, **more: Any) -> Request:
        """What the quantizer takes; ``more`` goes to ``make_request``. Raises UsageError."""
        from lbq.quantizer.request import make_request

        wanted = asdict(self)
        del wanted["revision"]
        return make_request(**wanted, **more)


def quantization_options(*, at_load: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--bits`` and what goes with it, handed to the command as one argument, ``wish``.

    ``at_load``: there is no default for the bits, and without them nothing is quantized.
    """
    bits = "Quantize a checkpoint while it is loaded: 3, 4 or 8." if at_load else "3, 4 or 8."
    options = (
        click.option("--bits", type=int, default=None if at_load else 4, show_default=True, help=bits),
        click.option(
            "--gs", "group", metavar="GROUP", help="Weights that share a scale: 32…512 or row. [128; row at 8 bits]"
        ),
        click.option("--lm-head", type=int, help="Bits of the output head: 8, 4 or 16.  [8]"),
        click.option("--keep", multiple=True, metavar="PATTERN", help="Linear layers that stay BF16. Repeatable."),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="PATTERN=BITS[:GROUP]",
            help="Mixed bits, as down_proj=8. Repeatable.",
        ),
        click.option("--revision", help="Branch, tag or commit on the Hub."),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_wish(**arguments: Any) -> None:
            wish = Wish(**{name: arguments.pop(name) for name in Wish.__dataclass_fields__})
            command(wish=wish, **arguments)

        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), with_wish)

    return decorate


def _split(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    del context, option
    return tuple(name.strip() for name in value.split(",")) if value else ()


readers_option = click.option(
    "--for",
    "readers",
    metavar="TOOLS",
    callback=_split,
    help="vllm,sglang: store groups that their fast kernels take.",
)
