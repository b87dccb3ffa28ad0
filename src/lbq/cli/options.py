"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from lbq.quantizer.request import Request


CALIB_HELP = (
    "Text for autoround and --target-bpw: .txt, .json, .jsonl or a Hub dataset.  "
    "[pile-10k for autoround, else English prose]"
)


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

    def scheme(self) -> dict[str, Any]:
        """What was asked for, by the names that :func:`lbq.convert` has for it."""
        asked = asdict(self)
        del asked["revision"]
        return asked

    def request(self, **more: Any) -> Request:
        """What the quantizer takes, 4 bits by default; ``more`` goes to ``make_request``. Raises UsageError."""
        from lbq.quantizer.request import make_request

        asked = self.scheme()
        if self.bits is None:
            del asked["bits"]
        return make_request(**asked, **more)


@dataclass(frozen=True)
class Method:
    """How codes are to be found, as it was given."""

    method: str
    iters: int | None
    nsamples: int | None
    seqlen: int | None
    batch_size: int | None
    calib: str | None
    seed: int | None


def quantization_options(*, at_load: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--bits`` and what goes with it, handed to the command as one argument, ``wish``.

    ``at_load``: without ``--bits`` nothing is quantized.
    """
    bits = "Quantize a checkpoint while it is loaded: 3, 4 or 8." if at_load else "3, 4 or 8.  [4]"
    options = (
        click.option("--bits", type=int, help=bits),
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

    return _as_one("wish", Wish, options)


def method_options() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--method`` and what goes with it, handed to the command as one argument, ``method``."""
    options = (
        click.option("--method", type=click.Choice(["rtn", "autoround"]), default="rtn", show_default=True),
        click.option("--iters", type=int, help="autoround: steps a block; 0 is its own round to nearest.  [200]"),
        click.option("--nsamples", type=int, help="autoround: samples of calibration text.  [128]"),
        click.option("--seqlen", type=int, help="autoround: tokens of a sample.  [2048]"),
        click.option("--batch-size", type=int, help="autoround: samples a step.  [8]"),
        click.option("--calib", metavar="FILE|DATASET", help=CALIB_HELP),
        click.option("--seed", type=int, help="autoround: of samples and steps.  [42]"),
    )
    return _as_one("method", Method, options)


def _as_one(
    name: str, kind: type[Wish] | type[Method], options: Sequence[Callable[[Callable[..., None]], Callable[..., None]]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options, and it one argument for all of them."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_one(**arguments: Any) -> None:
            fields = {field: arguments.pop(field) for field in kind.__dataclass_fields__}
            command(**{name: kind(**fields)}, **arguments)

        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), with_one)

    return decorate


def number_list(text: str, option: str, example: str) -> list[int]:
    """Whole numbers with commas between them, as ``option`` has them; each once."""
    return list(dict.fromkeys(_number(part.strip(), option, example) for part in text.split(",")))


def group_list(text: str) -> list[int | Literal["row"]]:
    """``--gs 32,256,row``; each once."""
    parts = dict.fromkeys(part.strip() for part in text.split(","))
    return ["row" if part == "row" else _number(part, "--gs", "64,128,row") for part in parts]


def _number(text: str, option: str, example: str) -> int:
    if not text.isdecimal():
        raise click.BadParameter(f"{text!r} is no number; give a list such as {example}", param_hint=option)
    return int(text)


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
