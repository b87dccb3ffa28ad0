"""Chat templates: messages to the text that a model was trained on.

Templates are programs from elsewhere, so they run in a process of their own with limits (``chat_worker.py``). The
surroundings they see are those of transformers' ``apply_chat_template``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lbq.formats.errors import DataError, UsageError
from lbq.runtime.text.config import TOKENIZER_CONFIG, load_tokenizer_config, read_optional

TEMPLATE_FILE = "chat_template.jinja"
Message = Mapping[str, object]
_WORKER = Path(__file__).with_name("chat_worker.py")
_RENDERED, _REFUSED_MESSAGES = b"r", b"m"


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use."""

    cpu_seconds: int = 3
    wall_seconds: float = 60.0  # the last resort, and generous: a loaded machine is not the template's fault
    memory_bytes: int = 512 << 20  # address space of the worker
    output_characters: int = 4 << 20

    @property
    def reply_bytes(self) -> int:
        """The longest reply of an honest worker: its kind, and four bytes a character."""
        return 1 + 4 * max(self.output_characters, 1 << 10)


class ChatTemplate:
    """The chat template of one model. Thread-safe; its worker starts with the first rendering."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], where: str, limits: RenderLimits | None = None
    ) -> None:
        """``special_tokens`` are variables like ``bos_token``; ``where`` names the template in errors."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._where = where
        self._worker = _Worker(limits or RenderLimits())

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template in ``chat_template.jinja``, else in ``tokenizer_config.json``; None if there is none.

        Of several named templates it is the one called "default". Raises DataError for malformed files.
        """
        config = load_tokenizer_config(folder)
        path = folder / TEMPLATE_FILE
        data = read_optional(path)
        if data is not None:
            try:
                return cls(data.decode(), config.special_tokens(), str(path))
            except UnicodeDecodeError:
                raise DataError(f"{path}: not UTF-8") from None
        where = f"{folder / TOKENIZER_CONFIG}: chat_template"
        found = config.chat_template
        if isinstance(found, list):
            named = {entry.name: entry.template for entry in found}
            if "default" not in named:
                raise DataError(f"{where}: no template called 'default' among {sorted(named)}")
            found = named["default"]
        return None if found is None else cls(found, config.special_tokens(), where)

    @property
    def supports_thinking(self) -> bool:
        """Whether the template has a switch for thinking, the variable ``enable_thinking``."""
        return "enable_thinking" in self.source

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: object) -> str:
        """The text of a conversation, up to where the model's answer begins.

        ``messages`` hold ``role``, ``content`` and whatever else the template knows, all of it plain JSON values;
        ``variables`` (``enable_thinking``, ``tools``, …) are passed on. Raises UsageError if the template refuses
        the messages, DataError if the template itself fails, reaches out of its sandbox or exceeds its limits.
        """
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise UsageError("a chat is a list of at least one message, each with a role and a content")
        request = {
            "template": self.source,
            "variables": {
                **self._special_tokens,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **variables,
                # Clients send "content": null; templates test whether the key is there.
                "messages": [{key: value for key, value in m.items() if value is not None} for m in messages],
            },
        }
        try:
            data = json.dumps(request).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"a chat message is not plain JSON: {error}") from None
        kind, text = self._worker.ask(data, self._where)
        if kind == _RENDERED:
            return text
        text = " ".join(text.split())[:500]
        if kind == _REFUSED_MESSAGES:
            raise UsageError(f"the chat template does not take these messages: {text}")
        raise DataError(f"{self._where}: the chat template fails: {text}")

    def thinking(self, think: bool | None) -> dict[str, bool]:
        """The variable for ``render`` that switches thinking; none for None. UsageError without such a switch."""
        if think is None:
            return {}
        if not self.supports_thinking:
            raise UsageError("this model's chat template has no switch for thinking: leave out --think and --no-think")
        return {"enable_thinking": think}

    def close(self) -> None:
        """End the worker; a later rendering starts another."""
        self._worker.close()


def require_template(template: ChatTemplate | None) -> ChatTemplate:
    """The template. Raises UsageError where the model has none."""
    if template is None:
        raise UsageError("this model has no chat template: it continues text but does not chat (--no-chat)")
    return template


class _Worker:
    """The process that renders: started when needed, ended when it exceeds a limit."""

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., _Worker] | None = None

    def ask(self, request: bytes, where: str) -> tuple[bytes, str]:
        """Kind and text of the reply; DataError, naming ``where``, if the worker died over it."""
        with self._lock:
            process = self._running()
            # Killing it closes its pipes, which ends any read or write below.
            timer = threading.Timer(self._limits.wall_seconds, process.kill)
            timer.start()
            try:
                reply = _exchange(process, request, self._limits.reply_bytes)
            except BaseException:  # KeyboardInterrupt: its reply must not be taken for that to the next request
                self._stop()
                raise
            finally:
                timer.cancel()
                timer.join()
            if reply is None:
                code = process.wait()
                self._stop()
                raise DataError(f"{where}: the chat template fails: {self._cause(code)}")
            return reply[:1], reply[1:].decode("utf-8", "surrogatepass")

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            limits = self._limits
            numbers = (limits.cpu_seconds, limits.memory_bytes, limits.output_characters)
            # -I -S: nothing of the environment and of this process's folders but where jinja2 is.
            command = [sys.executable, "-I", "-S", str(_WORKER), *map(str, numbers), *_template_engine_folders()]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C at the terminal is not for it
            )
            self._finalizer = weakref.finalize(self, _end, self._process)
        return self._process

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _cause(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return f"it ran for more than {self._limits.cpu_seconds} s of CPU time"
        if code == -signal.SIGKILL:
            return f"it was killed (after {self._limits.wall_seconds:g} s, or for memory)"
        return f"its process ended with status {code}"


def _exchange(process: subprocess.Popen[bytes], request: bytes, most: int) -> bytes | None:
    """Send a request and read the reply; None if the process ended or does not keep to the protocol."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(struct.pack("<I", len(request)) + request)
        process.stdin.flush()
    except BrokenPipeError:
        return None
    head = process.stdout.read(4)
    length = struct.unpack("<I", head)[0] if len(head) == 4 else 0
    if not 1 <= length <= most:
        process.kill()
        return None
    reply = process.stdout.read(length)
    return reply if len(reply) == length else None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):  # what was still buffered for it is of no use
                stream.close()


def _template_engine_folders() -> list[str]:
    """The folders that jinja2 and markupsafe are installed in."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    return list(dict.fromkeys(str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin))
