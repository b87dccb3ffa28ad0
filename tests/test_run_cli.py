"""``lbq run``: what it reads, answers and says, in this process and as a program at a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lbq.cli.prompts import read_prompts
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.text.generation import GenerationDefaults

pytestmark = pytest.mark.usefixtures("one_thread")

Answer = Callable[..., Any]
FINISH = re.compile(r"\[(\d+) tokens(?:, [\d.]+ tokens/s)?, first token after [\d.]+ s for a prompt of (\d+)")


@pytest.fixture
def answer(lbq: Callable[..., Any], kept_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """``answer(options…)`` runs the command on the CPU for 20 tokens."""
    monkeypatch.setattr(GenerationDefaults, "end_ids", lambda *_: frozenset())
    return lambda *options: lbq("run", kept_artifact, "--device", "cpu", "--max-tokens", "20", *options)


def prompt_tokens(done: Any) -> int:
    found = FINISH.search(done.err)
    assert found, done
    return int(found[2])


def test_an_answer_and_the_last_lines(answer: Answer) -> None:
    done = answer("-p", "hello", "--temperature", "0")
    assert done.code == 0
    assert done.out.strip()
    finish, where, *kernels = done.err.splitlines()
    assert re.fullmatch(FINISH.pattern + r", ended by --max-tokens\]", finish)
    assert finish.startswith("[20 tokens, ")
    assert where == "[CPU, 1 threads, context 128, keys and values in float32]"
    assert any("lm_head" in line for line in kernels)
    assert all(re.match(r"\[ *\d+ × ", line) for line in kernels)
    assert "context 100, " in answer("-p", "hello", "--context", "100").err


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_keys_and_values_in_few_bits(answer: Answer, kind: str) -> None:
    done = answer("-p", "hello", "--temperature", "0", "--kv-cache", kind)
    assert done.code == 0
    assert done.out.strip()
    assert f", keys and values in {kind}]" in done.err
    assert f"[keys and values  FALLBACK: no kernel here reads {kind}" in done.err
    refused = answer("-p", "hello", "--kv-cache", kind, "--strict")
    assert refused.code != 0
    assert "opened for every token; refused under --strict" in refused.err


def test_a_prompt_on_stdin(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer("-p", "hello", "--temperature", "0").out
    for options in ((), ("-p", "-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
        assert answer("--temperature", "0", *options).out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    done = answer()
    assert (done.code, done.error) == (3, "stdin: not UTF-8 at byte 0")
    monkeypatch.setattr(sys, "stdin", None)
    done = answer()
    assert (done.code, done.error) == (2, "stdin is closed: give a prompt with -p")


def test_a_system_prompt(answer: Answer) -> None:
    plain, more, bare = answer("-p", "a"), answer("-p", "a", "--system", "b"), answer("-p", "a", "--no-chat")
    assert prompt_tokens(more) > prompt_tokens(plain) > prompt_tokens(bare) == 1
    done = answer("-p", "a", "--system", "b", "--no-chat")
    assert (done.code, "--system" in done.error) == (2, True)


def test_stop_strings(answer: Answer) -> None:
    options = ("-p", "hello", "--temperature", "0")
    text = answer(*options).out.removesuffix("\n")
    assert len(text) > 4
    stop = text[3:5]
    done = answer(*options, "--stop", "never", "--stop", stop)
    assert done.out == text[: text.index(stop)] + "\n"
    assert "--max-tokens" not in done.err


def test_a_seed_and_notes_on_what_has_no_effect(answer: Answer) -> None:
    options = ("-p", "hello", "--top-p", "0.9")
    first, again, other = (answer(*options, "--temperature", "1", "--seed", seed) for seed in (1, 1, 2))
    assert first.out == again.out != other.out
    assert "note:" not in first.err
    done = answer(*options, "--temperature", "0", "--seed", "1")
    assert [line for line in done.err.splitlines() if line.startswith("note:")] == [
        "note: --top-p, --seed: no effect at temperature 0"
    ]


def test_a_model_that_only_continues(lbq: Callable[..., Any], artifact: Path, reseal: Callable[[Path], None]) -> None:
    (artifact / "chat_template.jinja").unlink()
    manifest = artifact / "lbq.json"
    manifest.write_text(re.sub(r'"chat_template\.jinja":\s*\{[^}]*\},?\s*', "", manifest.read_text()))
    reseal(artifact)
    run = ("run", artifact, "--device", "cpu", "--max-tokens", "3", "-p", "hello")
    done = lbq(*run)
    assert (done.code, done.err.count("note: this model has no chat template: it continues")) == (0, 1)
    assert "note:" not in lbq(*run, "--no-chat").err
    assert lbq(*run, "--chat").code == 2


def test_a_device_that_fails(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(DecoderEngine, "decode", fail)
    done = answer("-p", "hello")
    assert (done.code, "--context" in done.error) == (7, True)


def test_a_chat_goes_on_after_the_device_failed(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = DecoderEngine.prefill, [torch.OutOfMemoryError("CUDA out of memory")]

    def prefill(self: DecoderEngine, ids: list[int]) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return real(self, ids)

    stdin, messages = io.StringIO(), iter(("a", "b", "/exit"))
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("builtins.input", lambda _: next(messages))
    monkeypatch.setattr(DecoderEngine, "prefill", prefill)
    done = answer()
    assert done.code == 0
    assert "lbq: the GPU is out of memory" in done.err
    assert len(FINISH.findall(done.err)) == 1


# ------------------------------------------------------------------------ as a program

PROGRAM = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal to this process
from lbq import cli
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.text.generation import GenerationDefaults

steps, real = 0, DecoderEngine.decode

def decode(self, token):
    global steps
    steps += 1
    if steps == 3:
        print("<waiting>", file=sys.stderr, flush=True)
        while True:
            time.sleep(0.1)  # a signal that comes on the way into a sleep does not end it
    return real(self, token)

DecoderEngine.decode = decode
GenerationDefaults.end_ids = lambda *_: frozenset()
cli.main()
"""


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *command: object) -> None:
        self._end, other = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        self._seen = ""

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for ``pattern`` after what was waited for before."""
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, self._seen)):
            assert time.monotonic() < deadline, self._seen
            if select.select([self._end], [], [], 1)[0]:
                try:
                    self._seen += os.read(self._end, 1 << 16).decode(errors="replace")
                except OSError:  # the program has ended
                    raise AssertionError(self._seen) from None
        self._seen = self._seen[found.end() :]
        return found

    def type(self, text: str) -> None:
        self.expect("> $")
        os.write(self._end, text.encode())

    def interrupt(self) -> None:
        os.write(self._end, b"\x03")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(kept_artifact: Path) -> Iterator[Terminal]:
    options = ("--device", "cpu", "--threads", "1", "--max-tokens", "8", "--temperature", "0")
    made = Terminal(sys.executable, "-c", PROGRAM, "run", kept_artifact, *options)
    yield made
    made.close()


@pytest.mark.parametrize("end", ["/exit\n", "\x04"])
def test_a_chat(terminal: Terminal, end: str) -> None:
    def ask() -> int:
        terminal.type("a\n")
        return int(terminal.expect(FINISH.pattern)[2])

    terminal.type("a\n")
    terminal.expect("<waiting>")
    terminal.interrupt()
    terminal.expect(r"\(stopped\)")
    terminal.type("/reset\n")
    first, second = ask(), ask()
    assert second > first
    terminal.type("/help\n")
    terminal.expect("/reset begins a new chat")
    terminal.type("/reset\n")
    assert ask() == first
    terminal.type(end)
    terminal.expect(r"\[CPU, 1 threads, context 128, keys and values in float32\]")
    assert terminal.process.wait(60) == 0


@pytest.mark.parametrize(
    ("closed", "options", "code"), [("<&- >&- 2>&-", ["-p", "a"], 0), (">&-", ["-p", "a"], 0), ("<&-", [], 2)]
)
def test_streams_that_are_closed(kept_artifact: Path, closed: str, options: list[str], code: int) -> None:
    command = [sys.executable, "-m", "lbq.cli", "run", str(kept_artifact), "--device", "cpu", "--max-tokens", "2"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "a bug in lbq" not in done.stderr
    assert code == 0 or "give a prompt with -p" in done.stderr


def test_explained_kernels(answer: Answer, lbq: Callable[..., Any], kept_artifact: Path) -> None:
    done = answer("-p", "hello", "--explain")
    _, _, head, *explained = done.err.splitlines()
    assert head.startswith("Kernels on CPU, ")
    inspected = lbq("inspect", kept_artifact, "--kernels", "--device", "cpu")
    assert (inspected.code, inspected.out.splitlines()) == (0, [head, *explained])
    assert any(line.startswith("   2 × model.layers.*.mlp.down_proj: 64×96 INT4 g32") for line in explained)
    found = json.loads(lbq("inspect", kept_artifact, "--kernels", "--device", "cuda", "--json").out)
    assert [unit["use"]["count"] for unit in found["units"]] == [2, 2, 2, 2, 1]
    assert lbq("inspect", kept_artifact, "--kernels", "--device", "tpu").code == 2
    assert lbq("inspect", kept_artifact, "--device", "cpu").error == "--device goes with --kernels"
    assert lbq("inspect", kept_artifact, "--layers", "--kernels").code == 2


def test_prompts_of_a_file(answer: Answer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n\nthe cat\r\nx\n")
    done = answer("--prompts", path)
    assert done.code == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    alone = [answer("-p", prompt) for prompt in ("hello", "the cat", "x")]
    assert [one["text"] + "\n" for one in found] == [one.out for one in alone]
    assert [one["prompt_tokens"] for one in found] == [prompt_tokens(one) for one in alone]
    assert all((one["tokens"], one["reason"]) == (20, "length") for one in found)
    assert "[3 texts, 60 tokens in " in done.err
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff"hello"\n[{"role": "user", "content": "the cat"}]\n')
    done = answer("--prompts", path)
    assert [json.loads(line)["text"] for line in done.out.splitlines()] == [one["text"] for one in found[:2]]


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("data", [b"hello\n\nthe cat\r\nx", b'\xef\xbb\xbf\n "hello"\n"the cat"\n"x"\n'])
def test_prompts_of_stdin(answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    (tmp_path / "prompts.txt").write_text("hello\nthe cat\nx\n")
    expected = answer("--prompts", tmp_path / "prompts.txt")
    feed(monkeypatch, data)
    done = answer("--prompts", "-")
    assert (done.code, done.out) == (0, expected.out)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", '"a" b\n[c]', ['"a" b', "[c]"]),
        ("a.jsonl", '"a"', ["a"]),
        ("a.json", ' "a"\n"b"', ["a", "b"]),
        ("a", '[{"role": "user", "content": "a"}]', [[{"role": "user", "content": "a"}]]),
        ("a.md", "a\n[b]", ["a", "[b]"]),
    ],
)
def test_what_prompts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: list[object]
) -> None:
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == expected
    if name not in ("a.txt", "a.jsonl"):  # what a name does not say is told alike
        feed(monkeypatch, text.encode())
        assert read_prompts(Path("-")) == expected


@pytest.mark.parametrize(
    ("data", "options", "code", "said"),
    [
        (b"", (), 2, "stdin: there is no prompt in it"),
        (b"a\n\xff", (), 3, "stdin: not UTF-8 at byte 2"),
        (b"a", ("-p", "-"), 2, "one of the two"),
        (b'"a"\n{"b": 1}', (), 3, "stdin, line 2: Expected `str | array`, got `object`; a prompt in JSON is"),
        (b'"a" b', (), 3, "go into a FILE.txt"),
        (None, (), 2, "stdin is closed: give --prompts a FILE"),
    ],
)
def test_stdin_that_has_no_prompts(
    answer: Answer,
    monkeypatch: pytest.MonkeyPatch,
    data: bytes | None,
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    if data is None:
        monkeypatch.setattr(sys, "stdin", None)
    else:
        feed(monkeypatch, data)
    done = answer("--prompts", "-", *options)
    assert (done.code, done.out, said in done.error) == (code, "", True), done


@pytest.mark.parametrize(("end", "code"), [("interrupt", 130), ("close", 141)])
def test_answers_that_nobody_waits_for(kept_artifact: Path, end: str, code: int) -> None:
    command = [sys.executable, "-m", "lbq.cli", "run", str(kept_artifact), "--device", "cpu", "--prompts", "-"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*command, "--temperature", "0"], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"hello\n" * 1000)
        process.stdin.close()
        assert json.loads(process.stdout.readline())["prompt_tokens"] > 0
        if end == "interrupt":
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == code, said
    assert said == ("lbq: interrupted\n" if end == "interrupt" else "")


def test_broken_logits_of_one_prompt(answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n\nthe cat\nx\nthe dog\n")
    whole = ("--prompts", path, "--seed", "1")  # with a seed prompts are taken in whole
    sound = [json.loads(line) for line in answer(*whole).out.splitlines()]
    prefill = DecoderEngine.prefill

    def overflow(self: DecoderEngine, ids: Sequence[int]) -> torch.Tensor:
        logits = prefill(self, ids)
        return logits * float("nan") if len(ids) == sound[1]["prompt_tokens"] else logits

    monkeypatch.setattr(DecoderEngine, "prefill", overflow)
    done = answer(*whole)
    found = [json.loads(line) for line in done.out.splitlines()]
    assert (found[0], found[2]) == (sound[0], sound[2])
    assert "error" not in found[0]
    for one in found[1::2]:
        assert (one["text"], one["reason"], one["tokens"]) == ("", "error", 0)
        assert "not finite numbers" in one["error"]
    assert "[4 texts, 40 tokens in " in done.err
    assert done.code == 3
    last = done.err.splitlines()[-1]
    assert re.fullmatch(r"lbq: error: prompt 2: the model's logits are .*; 2 of 4 texts ended with an error", last)


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("a.txt", b"\n \n", (), "no prompt in it"),
        ("a.txt", b"\xff", (), "not UTF-8"),
        ("a.txt", b"hi", ("-p", "hi"), "one of the two"),
        ("a.jsonl", b'"a"\n{"b": 1}', (), "a.jsonl, line 2"),
        ("a.jsonl", b'"a"\n[{"role": "user"}]', (), "a.jsonl, line 2: a chat is"),
        ("a.jsonl", b"[]", (), "a.jsonl, line 1: a chat is"),
        ("a.jsonl", b'[{"role": "user", "content": "a"}]', ("--system", "b"), "prompt 1 is a list"),
        ("nowhere/a.txt", None, (), "nowhere"),
    ],
)
def test_prompts_that_are_refused(
    answer: Answer, tmp_path: Path, name: str, content: bytes | None, options: tuple[str, ...], said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = answer("--prompts", tmp_path / name, *options)
    assert done.code != 0
    assert said in done.error, done
