"""``lbq lm-eval``"""

from __future__ import annotations

import sys
from importlib import import_module

import click

from lbq.formats.errors import UsageError


@click.command("lm-eval", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def lm_eval(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness, which then knows the model lbq; arguments are the harness's own.

    \b
    lbq lm-eval run --model lbq --model_args path=ARTIFACT --tasks arc_easy
    lbq lm-eval run --help

    model_args: path (a folder or a Hub id), device, dtype, context, threads; bits, group, lm_head to quantize a
    checkpoint now. Needs pip install "lbq[lm-eval]".
    """
    if not arguments or arguments[0] in ("-h", "--help"):  # the harness may not be there to say it
        click.echo(context.get_help())
        return
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise UsageError('lm-evaluation-harness is not installed: pip install "lbq[lm-eval]"') from None
    import_module("lbq.lm_eval_model")  # registers the model
    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()
