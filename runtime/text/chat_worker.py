"""Renders chat templates in a process of its own. Run by path, never imported by the rest; imports only jinja2.

A chat template is a program that came with somebody's weights. Here it can hang, eat memory or break out of the
sandbox without reaching anything: CPU time, address space and output are limited, and no file, socket or process can
be opened any more once the first request is read.

Frames on stdin and stdout: four bytes of length, little-endian, then that many bytes.
Request: JSON ``{"template": str, "variables": {...}}``. Reply: one byte of kind (see KINDS), then UTF-8.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO

RENDERED, REFUSED_MESSAGES, BAD_TEMPLATE = KINDS = (b"r", b"m", b"t")
_LONGEST_ERROR = 500  # characters


def main() -> None:
    """``chat_worker.py CPU_SECONDS MEMORY_BYTES OUTPUT_CHARACTERS FOLDER...`` (folders: where jinja2 is)."""
    cpu_seconds, memory, output = (int(argument) for argument in sys.argv[1:4])
    sys.path.extend(sys.argv[4:])
    renderer = Renderer(output)
    renderer.warm_up()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 3)):
        resource.setrlimit(what, (most, most))
    while (request := _read_frame(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # at its end SIGPROF kills us: whoever waits sees that
        kind, text = renderer.reply(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        data = kind + text.encode("utf-8", "surrogatepass")
        sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
        sys.stdout.buffer.flush()


def _read_frame(stream: BinaryIO) -> bytes | None:
    head = stream.read(4)
    if len(head) < 4:
        return None  # the parent is gone or done
    return stream.read(struct.unpack("<I", head)[0])


class Renderer:
    """jinja2 set up the way Hugging Face chat templates expect it."""

    def __init__(self, most_output: int) -> None:
        self._most_output = most_output
        self._environment, self._refusal, self._template_error = _environment()
        self._compile: Callable[[str], Any] = functools.lru_cache(maxsize=4)(self._environment.from_string)

    def warm_up(self) -> None:
        """Do once what imports modules lazily, while files can still be opened."""
        self.reply(
            b'{"template": "{{ strftime_now(\'%c\') }}{{ [1] | tojson(indent=1) }}{{ 1 // 0 }}", "variables": {}}'
        )

    def reply(self, request: bytes) -> tuple[bytes, str]:
        """Kind and text of the reply to one request."""
        try:
            parsed = json.loads(request)
            return RENDERED, self._render(parsed["template"], parsed["variables"])
        except self._refusal as error:
            return REFUSED_MESSAGES, str(error)[:_LONGEST_ERROR]
        except MemoryError:
            return BAD_TEMPLATE, "it needs too much memory"
        except Exception as error:  # whatever a template can raise
            line = getattr(error, "lineno", None)
            place = "" if line is None else f" (line {line})"
            return BAD_TEMPLATE, f"{type(error).__name__}: {str(error)[:_LONGEST_ERROR]}{place}"

    def _render(self, template: str, variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        room = self._most_output
        for piece in self._compile(template).generate(**variables):
            room -= len(piece)
            if room < 0:
                raise self._template_error(f"its output is longer than {self._most_output} characters")
            pieces.append(piece)
        return "".join(pieces)


def _environment() -> tuple[Any, type[Exception], type[Exception]]:
    """The environment, and the errors it raises: for refused messages, and for templates in general."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class RefusalError(TemplateError):
        """raise_exception was called: the template does not take these messages."""

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # jinja2's own answer is an undefined value, which prints as nothing: a broken prompt and no error.
            if attribute.startswith("_"):
                raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which lbq does not allow")
            return super().unsafe_undefined(obj, attribute)

    class PlainNamespace(Namespace):
        """A namespace whose attributes cannot imitate Python's internals (``__class__``)."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"it sets {name!r} of a namespace, which lbq does not allow")
            super().__setitem__(name, value)

    class Generation(Extension):
        """``{% generation %}`` marks assistant text for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def namespace(**values: Any) -> PlainNamespace:
        made = PlainNamespace()
        for name, value in values.items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise RefusalError(message)

    def make_dict(*args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=_strftime_now, namespace=namespace, dict=make_dict
    )
    return environment, RefusalError, TemplateError


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as text for a model: jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


if __name__ == "__main__":
    main()
