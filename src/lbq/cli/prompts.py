"""``lbq run --prompts``: many prompts from a file or a pipe, their answers as JSON lines in the same order."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lbq.formats.errors import DataError, UsageError
from lbq.formats.json_file import MAX_BYTES, decode, read_bytes
from lbq.formats.wording import counted

if TYPE_CHECKING:
    from lbq.runtime.model import Model, Prompt
    from lbq.runtime.text.result import Result

JSON_BEGINS = '["{'  # of prompts; "{" is none, and said to be none


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of what is printed. ``tokens``: new ones; ``reason``: why the text ended; ``error``: if by one."""

    text: str
    reason: str
    prompt_tokens: int
    tokens: int
    error: str | None = None

    @classmethod
    def of(cls, result: Result) -> Answer:
        finish, error = result.finish, result.error
        return cls(
            result.text, finish.reason, finish.prompt_tokens, len(finish.tokens), None if error is None else str(error)
        )


def read_stdin(instead: str) -> str:
    """All of standard input. Raises DataError for what is no text, UsageError where there is none, with what to do
    ``instead``."""
    if sys.stdin is None:
        raise UsageError(f"stdin is closed: {instead}")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"stdin: more than {MAX_BYTES} bytes")
    return _decoded(data, "stdin")


def read_prompts(path: Path) -> list[Prompt]:
    """The lines of ``path``, or of standard input for ``-``, that are not empty.

    They are texts in FILE.txt, and JSON strings or lists of chat messages in FILE.jsonl; elsewhere JSON if the first
    begins like it. Raises StorageError and DataError for the file, UsageError where there is no prompt in it.
    """
    piped = path == Path("-")
    name = "stdin" if piped else str(path)
    if piped and sys.stdin is not None and sys.stdin.isatty():
        click.echo("Prompts, one a line; Ctrl-D ends them.", err=True)
    text = read_stdin("give --prompts a FILE") if piped else _decoded(read_bytes(path), name)
    lines = text.removeprefix("\ufeff").split("\n")
    found = [(i, line.removesuffix("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UsageError(f"{name}: there is no prompt in it, one a line")
    begins = found[0][1].lstrip()[0]
    if path.suffix == ".jsonl" or (path.suffix != ".txt" and begins in JSON_BEGINS):
        return [_prompt(line, f"{name}, line {i}") for i, line in found]
    return [line for _, line in found]


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}") from None


def _prompt(line: str, where: str) -> Prompt:
    kind: Any = str | list[dict[str, str]]
    try:
        prompt: Prompt = decode(line.encode(), kind, where)
    except DataError as error:
        rule = "a prompt in JSON is a string or a list of messages (texts that begin like JSON go into a FILE.txt)"
        raise DataError(f"{error}; {rule}") from None
    whole = isinstance(prompt, str) or (prompt and all({"role", "content"} <= message.keys() for message in prompt))
    if not whole:
        raise DataError(f"{where}: a chat is a list of at least one message, each with a role and a content")
    return prompt


def with_system(prompts: Sequence[Prompt], system: str | None) -> list[Prompt]:
    """Each behind a system prompt, if there is one. Raises UsageError for chats, which have their own."""
    if system is None:
        return list(prompts)
    found: list[Prompt] = []
    for i, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise UsageError(f"--system goes with prompts that are texts, and prompt {i} is a list of messages")
        found.append([{"role": "system", "content": system}, {"role": "user", "content": prompt}])
    return found


def answer(model: Model, prompts: Sequence[Prompt], **settings: Any) -> DataError | None:
    """Print the answers as they come, each behind those before it, and how long it took; the error to end with."""
    began, tokens, done = time.perf_counter(), 0, 0
    waiting: dict[int, Answer] = {}
    failed: dict[int, DataError] = {}
    for i, result in model.stream_batch(prompts, **settings):
        waiting[i] = Answer.of(result)
        if result.error is not None:
            failed[i] = result.error
        while done in waiting:
            found = waiting.pop(done)
            sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
            sys.stdout.flush()
            tokens, done = tokens + found.tokens, done + 1
    seconds = time.perf_counter() - began
    rate = f"{tokens / seconds:.1f} tokens/s, prompts included"
    click.echo(f"[{counted(done, 'text')}, {tokens} tokens in {seconds:.1f} s, {rate}]", err=True)
    if not failed:
        return None
    first = min(failed)
    more = f"; {len(failed)} of {done} texts ended with an error" if len(failed) > 1 else ""
    return DataError(f"prompt {first + 1}: {failed[first]}{more}")
