"""``lbq run``"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.display import Bar, note, plain, progress
from lbq.cli.kernels import print_explanation, print_uses
from lbq.cli.options import Wish, quantization_options
from lbq.cli.prompts import answer, read_prompts, read_stdin, with_system
from lbq.formats.errors import DataError, DeviceError, UsageError

if TYPE_CHECKING:
    from lbq.quantizer.prepare import Prepared
    from lbq.runtime.loading import LoadSettings
    from lbq.runtime.model import Model
    from lbq.runtime.text.generation import Finish
    from lbq.runtime.text.session import ChatSession

SAMPLING = ("top_k", "top_p", "min_p", "seed")  # options without effect on the most probable token
CHAT_HELP = "/reset begins a new chat, /exit or Ctrl-D ends, Ctrl-C stops an answer."


@click.command()
@click.argument("artifact")
@click.option("-p", "--prompt", help="Answer this and exit; - reads it from stdin, as does a pipe without -p.")
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Answer every line of FILE, or every text or list of messages of FILE.jsonl; - reads either from stdin. "
    "Prints JSON lines.",
)
@click.option("--system", help="System prompt.")
@click.option(
    "--chat/--no-chat", default=None, help="--no-chat: continue the prompt as it is, without the chat template."
)
@click.option("--think/--no-think", default=None, help="The chat template's switch, where it has one.")
@click.option("--max-tokens", type=int, default=1024, show_default=True, help="The most tokens of an answer.")
@click.option("--temperature", type=float, help="0 is greedy.  [the model's own]")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--repetition-penalty", type=float)
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable.")
@click.option(
    "--context",
    type=int,
    help="The most tokens of prompt and answer.  [the model's; on a GPU up to 8192, as memory allows]",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "float32"]), default="auto", help="float32: exact and slow.")
@click.option(
    "--kv-cache",
    type=click.Choice(["auto", "float", "int8", "int4"]),
    default="auto",
    help="Keys and values: float16 on a GPU and float32 on a CPU, or smaller and less exact; "
    "auto is int8 on a GPU for a --context of more than 8192.",
)
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--strict", is_flag=True, help="Fail where a layer would not get its fast kernel.")
@click.option("--explain", is_flag=True, help="Say at the end which kernel, tile and path each layer got, and why.")
@quantization_options(at_load=True)
def run(
    artifact: str,
    prompt: str | None,
    prompts_file: Path | None,
    system: str | None,
    chat: bool | None,
    think: bool | None,
    wish: Wish,
    strict: bool,
    explain: bool,
    context: int | None,
    device: Any,
    dtype: Any,
    kv_cache: Any,
    threads: int | None,
    **settings: Any,
) -> None:
    """Run ARTIFACT, a folder or a Hub id (owner/name@revision): answer a prompt, or chat at the terminal.

    With --bits, ARTIFACT is a checkpoint: it is quantized while it is loaded, and nothing is written.
    """
    if prompts_file is not None and prompt is not None:
        raise UsageError("--prompts and -p: one of the two")
    prompts = None if prompts_file is None else with_system(read_prompts(prompts_file), system)
    if prompts is None and (prompt == "-" or (prompt is None and not _at_terminal())):
        prompt = read_stdin("give a prompt with -p").removesuffix("\n")
    if system is not None and chat is False:
        raise UsageError("--system needs the chat template: leave out --no-chat")
    if prompt is None and prompts is None and chat is False:
        raise UsageError("--no-chat continues a prompt: give one with -p")
    given = {name: value for name, value in settings.items() if value is not None}
    where: LoadSettings = {
        "device": device, "dtype": dtype, "context": context, "strict": strict, "threads": threads,
        "kv_cache": kv_cache,
    }  # fmt: skip
    opened, loading = (_open_artifact if wish.bits is None else _open_checkpoint)(artifact, wish, where)
    failed: DataError | None = None
    with opened as model:
        asks = prompt is not None or prompts is not None
        _say_notes(model, given, continues=asks and system is None and chat is None)
        if prompts is not None:
            with loading.shown():
                model.bind()
            failed = answer(model, prompts, chat=chat, think=think, **given)
            finish = None
        elif prompt is None:
            with loading.shown():
                session = model.chat(system=system, think=think, **given)
            _chat(model, session)
            finish = None
        else:
            asked = prompt if system is None else _messages(system, prompt)
            with loading.shown():
                stream = model.stream(asked, chat=chat, think=think, **given)
            try:
                _write(stream)
            finally:
                click.echo()
            finish = stream.finish
        _say_how(model, finish, explain=explain)
        loading.say(model)
    if failed is not None:
        raise failed


class _Loading:
    """What is shown of a checkpoint that is quantized at load, if it is one."""

    def __init__(self, prepared: Prepared | None = None) -> None:
        self._prepared = prepared
        self._bar: Bar | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """A bar around the first thing that needs the weights."""
        if self._prepared is None:
            yield
            return
        with progress("Quantizing", len(self._prepared.plan.steps), self._prepared.source_bytes) as self._bar:
            yield

    def advance(self, name: str, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.advance(name, nbytes)

    def say(self, model: Model) -> None:
        if self._prepared is not None:
            scheme = self._prepared.request.scheme
            group = scheme.group or "row"
            click.echo(
                f"[INT{scheme.bits}, group {group}, quantized at load in {model.seconds_to_bind:.1f} s]", err=True
            )


def _open_artifact(artifact: str, wish: Wish, where: LoadSettings) -> tuple[Model, _Loading]:
    from lbq.hub.artifacts import find_artifact
    from lbq.runtime.loading import open_model

    if wish.given:
        raise UsageError("--gs, --lm-head, --keep and --set go with --bits, which quantizes a checkpoint")
    return open_model(find_artifact(artifact, wish.revision, on_note=note), **where), _Loading()


def _open_checkpoint(checkpoint: str, wish: Wish, where: LoadSettings) -> tuple[Model, _Loading]:
    from lbq.loading import check_checkpoint, quantize_on_load
    from lbq.quantizer.prepare import prepare
    from lbq.quantizer.source import resolve

    request = wish.request(strict=where["strict"])
    check_checkpoint(checkpoint)
    prepared = prepare(resolve(checkpoint, wish.revision, note), request)
    for text in prepared.plan.notes:
        note(text)
    loading = _Loading(prepared)
    return quantize_on_load(prepared, loading.advance, **where), loading


def _say_notes(model: Model, given: dict[str, Any], *, continues: bool) -> None:
    """What differs from what the user may expect."""
    if model.note is not None:
        note(model.note)
    if continues and model.template is None:
        note("this model has no chat template: it continues the text as it is")
    if model.options(**given).sampling.temperature == 0.0:
        idle = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
        if idle:
            note(f"{', '.join(idle)}: no effect at temperature 0")


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _messages(system: str, prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def _chat(model: Model, session: ChatSession) -> None:
    """A conversation at the terminal, until /exit or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()

    from lbq.runtime.text.generation import Finish

    click.echo(f"{CHAT_HELP} Up to {model.context} tokens.", err=True)
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            click.echo()
            return
        if message == "/exit":
            return
        if message == "/reset":
            session.reset()
        elif message.startswith("/"):
            click.echo(CHAT_HELP, err=True)
        elif message:
            try:
                for item in session.reply(message):
                    if isinstance(item, Finish):
                        click.echo()
                        _say_finish(item)
                    else:
                        _write((item,))
            except KeyboardInterrupt:
                click.echo()
                click.echo("(stopped)", err=True)
            except (UsageError, DeviceError) as error:  # the chat does not fit any more; it can be reset
                click.echo(f"lbq: {plain(str(error))}", err=True)


def _write(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


def _say_finish(finish: Finish) -> None:
    why = {"length": ", ended by --max-tokens", "context": ", the context is full"}.get(finish.reason, "")
    rate = f", {finish.tokens_per_second:.1f} tokens/s" if finish.tokens_per_second else ""
    click.echo(
        f"[{len(finish.tokens)} tokens{rate}, first token after {finish.seconds_to_first_token:.2f} s "
        f"for a prompt of {finish.prompt_tokens}{why}]",
        err=True,
    )


def _say_how(model: Model, finish: Finish | None, *, explain: bool) -> None:
    """What was done, where, and by which kernel; a fallback is said."""
    if finish is not None:
        _say_finish(finish)
    click.echo(f"[{_device(model)}, context {model.context}, keys and values in {model.cache.dtype}]", err=True)
    if model.cache.fallback is not None:
        click.echo(f"[keys and values  FALLBACK: {model.cache.fallback}]", err=True)
    if model.step_fallback is not None:
        click.echo(f"[tokens decoded kernel by kernel  FALLBACK: {model.step_fallback}]", err=True)
    if model.prompt_fallback is not None:
        click.echo(f"[prompts by torch's attention  FALLBACK: {model.prompt_fallback}]", err=True)
    if model.step_fallback is None and model.device.type == "cuda" and not explain:
        click.echo(f"[{model.explain().step}]", err=True)
    if explain:
        print_explanation(model.explain(), err=True)
    else:
        print_uses(model.kernels())


def _device(model: Model) -> str:
    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"CPU, {torch.get_num_threads()} threads"
