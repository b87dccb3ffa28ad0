"""Templates render as in transformers, and no template can hang, exhaust or escape."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lbq.formats.errors import DataError, UsageError
from lbq.runtime.text.chat import ChatTemplate, RenderLimits

USER = [{"role": "user", "content": "Who are you?"}]
CHAT = [
    {"role": "system", "content": "  Be brief & <polite>. "},
    {"role": "user", "content": "你好 👍\nline"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"},
    {"role": "user", "content": "Next?"},
]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "get", "arguments": {"city": "Zürich", "n": 1.5}}]},
    {"role": "tool", "content": '{"t": 3}'},
]
TOOLS = [{"type": "function", "function": {"name": "get", "description": "a <b> & 'c'", "parameters": {"x": None}}}]

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
'<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + \
message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}\
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system\\n\\nToday: " + date_string + "\\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {{- message.tool_calls[0].arguments | tojson }}
    {%- else %}
        {{- message.content is mapping or message.content is string }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n\\n' }}
{%- endif %}
"""

QWEN3 = """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not message.content.startswith('<tool>') %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {%- if loop.last and message.role == 'tool' %}{%- continue %}{%- endif %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

BLOCKS = """{% macro one(m, i=0) %}
  {{ i }}:{{ m.role }}{{ m | tojson }}
{% endmacro %}
{% generation %}{% set inner = 1 %}x{% endgeneration %}
{% for m in messages if m.role != 'tool' %}
    {% if loop.index > 2 %}
        {% break %}
    {% endif %}
  {{ one(m, loop.index0) }}
{% endfor %}
{{ inner is defined }} {{ dict(a=1, b=[1]) | tojson(sort_keys=true, separators=(',', ':')) }}
{{ messages | map(attribute='role') | list | join(',') }} {{ documents is none }} {{ pad_token is defined }}
{{ {'z': '<&>'} | items | list }} {{ eos_token }}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "blocks": BLOCKS}

Make = Callable[..., ChatTemplate]


@pytest.fixture
def make() -> Iterator[Make]:
    """Templates under small limits, whose workers end with the test."""
    made: list[ChatTemplate] = []

    def template(source: str, **limits: int | float) -> ChatTemplate:
        defaults = {"cpu_seconds": 1, "output_characters": 100_000, "memory_bytes": 256 << 20}
        made.append(
            ChatTemplate(source, {"bos_token": "<s>"}, "m/chat_template.jinja", RenderLimits(**defaults | limits))
        )
        return made[-1]

    yield template
    for one in made:
        one.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str, byte_level_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(byte_level_folder)
    ours = ChatTemplate(TEMPLATES[name], theirs.special_tokens_map, "here")
    compared = 0
    for messages in (USER, CHAT, CALLS):
        if messages is CALLS and name == "chatml":
            continue  # it has no place for a message without content
        for prompt in (True, False):
            for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}, {"tools": TOOLS}):
                want = theirs.apply_chat_template(
                    messages, chat_template=TEMPLATES[name], add_generation_prompt=prompt, tokenize=False, **variables
                )
                assert ours.render(messages, add_generation_prompt=prompt, **variables) == want
                compared += 1
    assert compared >= 16
    ours.close()


def test_the_date_is_local_and_today(make: Make) -> None:
    from datetime import datetime

    before = datetime.now().strftime("%d %b %Y")
    text = make("{{ strftime_now('%d %b %Y') }}").render(USER)
    assert text in (before, datetime.now().strftime("%d %b %Y"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__class__ }}",
        "{{ self.__init__ }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns }}",
        "{{ namespace(__class__=1) }}",
    ],
)
def test_reaching_for_internals_is_one_clear_error(source: str, make: Make) -> None:
    template = make(source)
    with pytest.raises(DataError, match=r"^m/chat_template\.jinja: the chat template fails: [^\n]*'__\w+'[^\n]*$"):
        template.render(USER)
    template.source = CHATML
    assert template.render(USER)  # the worker lives on


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% if i < 0 %}a{% endif %}{% endfor %}{% endfor %}",
            "CPU",
        ),
        ("{{ 2 ** 9999999999 }}", "CPU|memory"),
        ("{{ 'x' * 10 ** 9 }}", "memory"),
        ("{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "memory"),
        ("{% for i in range(99999) %}{{ 'abc' }}{% endfor %}", "longer than 100000"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ messages.append(1) }}", "append"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ lipsum() }}", "OSError"),  # would read a file of jinja2's, and none can be opened
        ("{% if %}", "TemplateSyntaxError.*line 1"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_templates_that_fail_or_exceed_a_limit(source: str, reason: str, make: Make) -> None:
    template = make(source)
    with pytest.raises(DataError, match=rf"^m/chat_template\.jinja: the chat template fails: [^\n]*({reason})[^\n]*$"):
        template.render(USER)
    template.source = "fine {{ bos_token }}"
    assert template.render(USER) == "fine <s>"


def test_a_worker_that_never_answers_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = tmp_path / "silent.py"
    silent.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr("lbq.runtime.text.chat._WORKER", silent)
    for content in ("hi", "x" * 1_000_000):  # the second fills the pipe, so that writing hangs too
        with pytest.raises(DataError, match="killed"):
            make("{{ 1 }}", wall_seconds=0.5).render([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "reply", ["b''", "b'\\xff\\xff\\xff\\xff' + b'a' * 100", "b'\\x00\\x00\\x00\\x00'", "b'\\x09\\x00'"]
)
def test_a_worker_that_breaks_the_protocol(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reply: str
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(f"import sys\nsys.stdin.buffer.read(8)\nsys.stdout.buffer.write({reply})\n")
    monkeypatch.setattr("lbq.runtime.text.chat._WORKER", broken)
    with pytest.raises(DataError, match="the chat template fails"):
        make("{{ 1 }}").render(USER)


def test_an_interrupted_rendering_does_not_answer_the_next(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from lbq.runtime.text import chat

    template = make("{{ messages[0].content }}")

    def interrupted(process: subprocess.Popen[bytes], request: bytes, _: int) -> bytes | None:
        assert process.stdin is not None
        process.stdin.write(len(request).to_bytes(4, "little") + request)
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": "first"}])
    assert template.render([{"role": "user", "content": "second"}]) == "second"


def test_refused_messages_are_a_usage_error(make: Make) -> None:
    template = make("{{ raise_exception('Roles must\n alternate ' + 'x' * 9999999) }}")
    with pytest.raises(UsageError, match=r"messages: Roles must alternate x{100,500}$"):
        template.render(USER)


@pytest.mark.parametrize("messages", [[], ["hi"], [{"role": "user", "content": b"bytes"}], [{"content": object()}]])
def test_messages_that_are_none(make: Make, messages: list[dict[str, object]]) -> None:
    with pytest.raises(UsageError):
        make("{{ 1 }}").render(messages)


def test_any_string_passes_through(make: Make) -> None:
    text = "\x00 \ud800 \U0010ffff \r\n é 👍" * 50
    assert make("{{ messages[0].content }}").render([{"role": "user", "content": text}]) == text


def test_threads_get_their_own_answers(make: Make) -> None:
    template = make("{{ messages[0].content }}")
    wrong: list[str] = []

    def work(name: str) -> None:
        for i in range(20):
            if template.render([{"role": "user", "content": f"{name}{i}"}]) != f"{name}{i}":
                wrong.append(name)  # noqa: PERF401

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_worker_ends_with_its_template_and_shrugs_off_ctrl_c(make: Make) -> None:
    template = make("{{ 1 }}")
    template.render(USER)
    process = template._worker._process
    assert process is not None
    assert os.getsid(process.pid) != os.getsid(0)  # the terminal's signals do not reach it
    template.close()
    assert process.returncode == -signal.SIGKILL
    assert template.render(USER) == "1"


def test_the_worker_imports_no_torch() -> None:
    from lbq.runtime.text import chat_worker

    code = f"import runpy, sys; runpy.run_path({chat_worker.__file__!r}); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "json" in loaded
    assert not {"torch", "lbq", "transformers"} & set(loaded)


def test_load_prefers_the_file_of_its_own(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}config"}))
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert not found.supports_thinking
    assert found.render(USER) == "<b>config"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file {{ enable_thinking }}", encoding="utf-8")
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert found.supports_thinking
    assert found.render(USER, enable_thinking=False) == "<b>file False"


def test_named_templates(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    config.write_text(json.dumps({"chat_template": named}))
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert found.source == "plain"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(DataError, match=r"tokenizer_config\.json: chat_template: .*'default'.*'tool_use'"):
        ChatTemplate.load(tmp_path)


def test_malformed_template_files(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"chat_template\.jinja: not UTF-8"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        ChatTemplate.load(tmp_path)
