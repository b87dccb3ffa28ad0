"""The command line. Every command calls the library; errors become one line and an exit code, never a traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import click

from lbq import __version__
from lbq.cli.bench import bench
from lbq.cli.compare import compare
from lbq.cli.convert import convert
from lbq.cli.display import plain
from lbq.cli.evaluate import evaluate
from lbq.cli.export import export
from lbq.cli.hub import card, pull, push
from lbq.cli.importing import import_
from lbq.cli.inspect import inspect
from lbq.cli.lm_eval import lm_eval
from lbq.cli.plan import plan
from lbq.cli.profile import profile
from lbq.cli.report import report
from lbq.cli.run import run
from lbq.cli.sweep import sweep
from lbq.cli.verify import verify
from lbq.formats.errors import LbqError

INTERRUPTED = 130
PIPE_CLOSED = 141
TERMINATED = 143


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="lbq %(version)s")
def cli() -> None:
    """Quantize language models to INT8, INT4 or INT3, and run them.

    \b
    Exit codes: 0 done, 1 a bug in lbq, 2 usage, 3 bad data, 4 input/output, 5 busy,
    6 the Hub, 7 the device, 130 interrupted, 141 nobody reads the output, 143 terminated.
    """


for command in (
    plan,
    convert,
    import_,
    export,
    inspect,
    verify,
    report,
    evaluate,
    compare,
    sweep,
    lm_eval,
    run,
    bench,
    profile,
    pull,
    push,
    card,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that a terminal cannot show is escaped, not an error
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_run())


def _open_closed_streams() -> None:
    """Stand in for streams that the caller closed (``>&-``): nobody reads them, and no file may get their number.

    ``sys.stdin`` stays None, so that a command can say that it has nothing to read.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least free number
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise SystemExit(TERMINATED)  # unwinds: staging folders and locks are removed on the way


def _run() -> int:
    try:
        with cli.make_context("lbq", sys.argv[1:]) as context:  # not cli.main: it ends with 1 when a pipe closes
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _say(f"error: {' '.join(error.format_message().split())}", error.exit_code)
    except LbqError as error:
        return _say(f"error: {error}", error.exit_code)
    except BrokenPipeError:  # whoever read our output has gone, and the work may not be done
        _drop_output()
        return PIPE_CLOSED
    except MemoryError:
        return _say("error: out of memory", 4)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"error: {where}{error.strerror or error}", 4)
    except Exception as error:
        if os.environ.get("LBQ_TRACEBACK"):
            traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return _say(f"error: a bug in lbq, please report it: {what} (LBQ_TRACEBACK=1 shows where)", 1)


def _say(text: str, code: int) -> int:
    try:
        click.echo(f"lbq: {plain(text)}", err=True)
    except BrokenPipeError:  # the code still says it
        _drop_output()
    return code


def _drop_output() -> None:
    """Let nothing be written any more: Python would complain of a closed pipe once more when it flushes at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
