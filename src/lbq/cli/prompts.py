"""``lbq run --prompts``: many prompts from a file, their answers as JSON lines in the same order."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lbq.formats.errors import DataError, UsageError
from lbq.formats.json_file import decode, read_bytes
from lbq.formats.wording import counted

if TYPE_CHECKING:
    from lbq.runtime.model import Model, Prompt, Result


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


def read_prompts(path: Path) -> list[Prompt]:
    """The lines of ``path`` that are not empty: texts, or in a .jsonl file JSON strings and lists of chat messages.

    Raises StorageError and DataError for the file, UsageError where there is no prompt in it.
    """
    try:
        lines = read_bytes(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    found = [(i, line.removesuffix("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UsageError(f"{path}: there is no prompt in it, one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in found]
    return [_prompt(line, f"{path}, line {i}") for i, line in found]


def _prompt(line: str, where: str) -> Prompt:
    kind: Any = str | list[dict[str, str]]
    prompt: Prompt = decode(line.encode(), kind, where)
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
