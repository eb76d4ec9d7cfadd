"""Hostile chat templates: each ends soon, in one clear error or harmless, having read nothing."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from models import chat_template
from models.chat_template import ChatTemplate, render

USER = {"role": "user", "content": "hello"}
RENDERER = Path(chat_template.__file__).with_name("template_renderer.py")
CPU_SECONDS = 2.0  # the limit on rendering is 1 s; the rest is the start of Python and jinja2
MAX_BYTES = 1_000_000_000

TOO_LONG, TOO_BIG, CRASH = "s of processor time", "MiB of memory", "crashed the renderer"
GROWS = f"{TOO_BIG}|{TOO_LONG}"  # on a slow machine the time is up before the memory is
FORBIDDEN = "SecurityError"


def nest(opening: str, closing: str, depth: int, inside: str = "") -> str:
    """A construct inside itself."""
    return opening * depth + inside + closing * depth


def doubled(step: str, start: str = "'aaaaaaaa'") -> str:
    """A variable that a loop replaces by ``step`` over and over."""
    return (
        f"{{% set box = namespace(x={start}) %}}{{% for _ in range(99999) %}}"
        f"{{% set box.x = {step} %}}{{% endfor %}}"
    )


# name -> the template, and a part of the error; an expression where several are right.
ERRORS = {
    # Time.
    "nested_loops": (
        "{% set r = range(99999) %}" + nest("{% for _ in r %}", "{% endfor %}", 3),
        TOO_LONG,
    ),
    "loop_over_text": (nest("{% for _ in 'a' * 9**8 %}", "{% endfor %}", 2), TOO_LONG),
    "power": ("{{ 9 ** (9 ** 9) }}", TOO_LONG),
    "power_at_run_time": ("{% set n = messages | length + 9 %}{{ n ** (n ** n) }}", TOO_LONG),
    "factorial": (doubled("box.x * box.x", "3"), TOO_LONG),
    "lipsum": ("{{ lipsum(n=1000000000) }}", f"{TOO_LONG}|{TOO_BIG}"),
    "macro_tree": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(64) }}",
        TOO_LONG,
    ),
    "recursive_loop": (
        "{% for x in [1, 1] recursive %}{% if loop.depth < 64 %}{{ loop([1, 1]) }}{% endif %}"
        "{% endfor %}",
        TOO_LONG,
    ),
    "replace": ("{{ ('a' * 9**6) | replace('a', 'a' * 9**6) }}", f"{TOO_LONG}|{TOO_BIG}"),
    "text_to_number": ("{{ ('9' * 9**8) | int }}{{ 1 / 0 }}", f"{TOO_LONG}|ZeroDivision"),
    "self_join": (doubled("box.x | list | join | reverse", "'a' * 9**5"), TOO_LONG),
    "silent_macro_loop": (
        "{% macro f() %}{% for _ in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
        "{% call f() %}{% call f() %}{% endcall %}{% endcall %}",
        TOO_LONG,
    ),
    # Memory and output.
    "huge_text": ("{{ 'a' * 3_000_000_000 }}", TOO_BIG),
    "huge_text_at_run_time": ("{{ messages[0].role * 3_000_000_000 }}", TOO_BIG),
    "huge_list": ("{{ ([0] * 3_000_000_000) | length }}", TOO_BIG),
    "huge_padding": ("{{ '%3000000000d' % 1 }}", TOO_BIG),
    "huge_format": ("{{ '{:>3000000000}'.format(1) }}", TOO_BIG),
    "huge_center": ("{{ 'a' | center(3000000000) }}", TOO_BIG),
    "huge_indent": ("{{ ('a\n' * 9**5) | indent(9**5) }}", f"{TOO_LONG}|{TOO_BIG}"),
    "huge_json": ("{{ [[1]] | tojson(indent=3000000000) }}", TOO_BIG),
    "doubling": (doubled("box.x + box.x"), GROWS),
    "doubling_list": (doubled("box.x + box.x", "[1]"), GROWS),
    "list_of_texts": (doubled("box.x + [_ | string * 9**5]", "[]"), GROWS),
    "output": ("{% for _ in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "output exceeds"),
    "output_at_once": ("{{ 'a' * 9**8 }}", "output exceeds"),
    "output_of_nested_macros": (
        "{% macro a() %}" + "x" * 99 + "{% endmacro %}"
        "{% macro b() %}{% for _ in range(999) %}{{ a() }}{% endfor %}{% endmacro %}"
        "{% for _ in range(999) %}{{ b() }}{% endfor %}",
        "output exceeds",
    ),
    "range": ("{{ range(100000000) | list }}", "Range too big"),
    "range_loop": ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "Range too big"),
    "batch": ("{{ [1] | batch(3000000000, 0) | list | length }}", TOO_BIG),
    "slice": ("{{ [1] | slice(3000000000) | list | length }}", f"{TOO_LONG}|{TOO_BIG}"),
    # Depth.
    "macro_of_itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "macros_of_each_other": (
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
        "UndefinedError|RecursionError",
    ),
    "block_of_itself": ("{% block a %}{{ self.a() }}{% endblock %}", "RecursionError"),
    "deep_parentheses": ("{{ " + nest("(", ")", 50_000, "1") + " }}", "RecursionError"),
    "deep_lists": ("{{ " + nest("[", "]", 500) + " }}", "Error"),
    "deep_conditions": (nest("{% if messages %}", "{% endif %}", 3_000), "Error"),
    "deep_loops": (nest("{% for _ in messages %}", "{% endfor %}", 99), "Error"),
    "deep_negations": ("{{ " + "not " * 30_000 + "1 }}", "Error"),
    "deep_sums": ("{{ " + "messages + " * 10_000 + "1 }}", f"Error|{CRASH}"),
    "deep_filters": ("{{ messages" + " | list" * 10_000 + " }}", f"Error|{CRASH}"),
    "deep_attributes": ("{{ messages" + ".a" * 50_000 + " }}", f"Error|{CRASH}"),
    "deep_value": (doubled("[box.x]", "[]") + "{{ box.x }}", "RecursionError"),
    "deep_value_as_json": (doubled("[box.x]", "[]") + "{{ box.x | tojson }}", "RecursionError"),
    # Ways out of the sandbox.
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", FORBIDDEN),
    "classes_by_item": ("{{ ''['__class__']['__mro__'] }}", FORBIDDEN),
    "classes_by_dict": ("{{ dict.mro()[1].__subclasses__() }}", FORBIDDEN),
    "globals_of_cycler": ("{{ cycler.__init__.__globals__.os.listdir('/') }}", FORBIDDEN),
    "globals_of_joiner": ("{{ joiner.__init__.__globals__ }}", FORBIDDEN),
    "globals_of_lipsum": ("{{ lipsum.__globals__['os'].popen('id').read() }}", FORBIDDEN),
    "globals_of_exception": ("{{ raise_exception.__globals__.json }}", FORBIDDEN),
    "builtins_of_self": ("{{ self.__init__.__globals__.__builtins__.open('x') }}", FORBIDDEN),
    "environment_of_self": ("{{ self._TemplateReference__context.environment }}", FORBIDDEN),
    "spoofed_class": ("{% set n = namespace(__class__=dict) %}{{ n.__class__.mro }}", FORBIDDEN),
    "generator_frame": ("{{ (messages | map('upper')).gi_frame.f_globals }}", FORBIDDEN),
    "format_attack": ("{{ '{0.__class__.__mro__}'.format(messages) }}", FORBIDDEN),
    "format_map_attack": (
        "{{ '{m.__class__.__init__.__globals__}'.format_map({'m': messages}) }}",
        FORBIDDEN,
    ),
    "format_by_filter": (
        "{{ ['{0.__class__.__mro__}'] | map('attr', 'format') | first()(messages) }}",
        f"{FORBIDDEN}|TemplateSyntaxError",
    ),
    "mutation": ("{{ messages.append(1) }}", FORBIDDEN),
    "mutation_of_message": ("{{ messages[0].update(role='system') }}", FORBIDDEN),
    "call_of_text": ("{{ 'open'('/etc/passwd') }}", "TypeError"),
    # Files.
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "include_if_there": ("{% include ['/etc/passwd'] ignore missing %}", "no loader"),
    "import": ("{% import '/etc/passwd' as x %}", "no loader"),
    "from_import": ("{% from '/etc/passwd' import x %}", "no loader"),
    "extends": ("{% extends '/etc/passwd' %}", "no loader"),
    "extends_message": ("{% extends messages[0].content %}", "no loader"),
    "open": ("{{ open('/etc/passwd').read() }}", "'open' is undefined"),
    "open_filter": ("{{ '/etc/passwd' | open }}", "No filter named 'open'"),
    "python_import": ("{{ __import__('os').environ }}", "'__import__' is undefined"),
    "codec": ("{{ 'x'.encode('cp1140') }}", "Error"),  # would be read from Python's library
    "do_extension": ("{% do messages.append(1) %}", "unknown tag"),
    # Plainly wrong.
    "unclosed_tag": ("{% for", "TemplateSyntaxError"),
    "unclosed_block": ("{% if messages %}x", "TemplateSyntaxError"),
    "unclosed_comment": ("{# " + "x" * 99_999, "TemplateSyntaxError"),
    "unclosed_text": ("{{ '" + "x" * 99_999, "TemplateSyntaxError"),
    "unclosed_tags": ("{{" * 60_000, "Error"),
    "megabyte": ("a" * (1 << 20), "expected at most"),
    "undefined_function": ("{{ system('id') }}", "'system' is undefined"),
    "undefined_attribute": ("{{ missing.attribute }}", "'missing' is undefined"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "refusal": ("{{ raise_exception('no system role') }}", "TemplateError: no system role"),
    "long_refusal": ("{{ raise_exception('no ' * 99999) }}", "TemplateError: no no"),
    "terminal_codes": ("{{ raise_exception('\x1b[2Ja\nb\x07') }}", "TemplateError: \ufffd.2Ja b"),
}

# name -> the template and what it renders: jinja2 makes these harmless.
HARMLESS = {
    "classes_by_filter": ("a{{ '' | attr('__class__') | attr('__mro__') }}b", "ab"),
    "classes_by_map": ("{{ messages | map(attribute='__class__') | list }}", "[Undefined]"),
    "deep_value_as_key": (doubled("(box.x,)", "()") + "{{ {box.x: 1} | length }}", "1"),
    "undefined": ("a{{ missing }}b", "ab"),
    "undefined_builtin": ("a{{ __builtins__ }}{{ os }}{{ config }}b", "ab"),
    "empty": ("", ""),
    "self_reference": ("{% set x = [] %}{% set x = [x, x] %}{{ x }}", "[[], []]"),
    "namespace": ("{% set n = namespace() %}{% set n.n = 1 %}{{ n.n }}", "1"),
    "no_date": ("{{ strftime_now is defined }}{{ now is defined }}", "FalseFalse"),
    "messages_as_template": ("{{ '{{ 7 * 7 }}' }}", "{{ 7 * 7 }}"),
    "many_blocks": ("{% if messages %}{% endif %}" * 3_000, ""),
}


class Used(NamedTuple):
    """What one rendering took, the start of its process included."""

    cpu_seconds: float
    max_bytes: int


@pytest.fixture
def used(monkeypatch, tmp_path):
    """Measures renderings: a function that gives what the latest one used."""
    pytest.importorskip("resource")
    # A process between, because what this one has used hides what its children use.
    launcher, report = tmp_path / "launcher.py", tmp_path / "used.json"
    launcher.write_text(
        "import json, os, resource, signal, subprocess, sys\n"
        f"code = subprocess.run([sys.executable, '-P', {str(RENDERER)!r}]).returncode\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "peak = used.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)\n"
        f"with open({str(report)!r}, 'w') as file:\n"
        "    json.dump([used.ru_utime + used.ru_stime, peak], file)\n"
        "if code < 0:\n"
        "    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "    os.kill(os.getpid(), -code)\n"
        "sys.exit(code)\n"
    )
    monkeypatch.setattr(chat_template, "_RENDERER", launcher)
    return lambda: Used(*json.loads(report.read_text())) if report.exists() else Used(0.0, 0)


def with_speed(name: str):
    """Marks the templates that use up their time, all but one, as slow tests."""
    is_slow = ERRORS[name][1] == TOO_LONG and name != "nested_loops"
    return pytest.param(name, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize("name", [with_speed(name) for name in ERRORS])
def test_hostile_template_is_an_error(name, used):
    text, expected = ERRORS[name]
    with pytest.raises(ValueError, match=r"^hostile\.jinja: the chat template.*--nochat") as caught:
        render(ChatTemplate(text, "hostile.jinja"), [[USER]])
    message = str(caught.value)
    assert re.search(expected, message), message
    assert len(message) < 700
    assert message.isprintable()
    assert "root:" not in message  # /etc/passwd
    assert used().cpu_seconds < CPU_SECONDS
    assert used().max_bytes < MAX_BYTES


@pytest.mark.parametrize("name", HARMLESS)
def test_hostile_template_is_harmless(name, used):
    text, expected = HARMLESS[name]
    assert render(ChatTemplate(text, "hostile.jinja"), [[USER]]) == [expected]
    assert used().cpu_seconds < CPU_SECONDS
    assert used().max_bytes < MAX_BYTES


def test_no_file_can_be_opened():
    code = (
        "import runpy\n"
        f"program = runpy.run_path({str(RENDERER)!r})\n"
        "program['limit_resources'](1.0)\n"
        f"for name in ({str(RENDERER)!r}, '/dev/null', '.'):\n"
        "    try:\n"
        "        open(name).close()\n"
        "    except OSError as error:\n"
        "        print(error.strerror)\n"
        "import socket\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "Too many open files\n" * 3
    assert "Error" in found.stderr  # neither can another module


def test_time_limit_survives_an_ignored_signal(monkeypatch):
    monkeypatch.setattr(chat_template, "_CPU_SECONDS", 0.2)
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        with pytest.raises(ValueError, match=r"not done after 0\.2 s of processor time"):
            render(ChatTemplate(ERRORS["nested_loops"][0], "hostile.jinja"), [[USER]])
    finally:
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", "crashed the renderer .Aborted"),
        ("raise SystemExit(3)", "the renderer ended with exit code 3"),
        ("raise ImportError('no jinja2')", "ImportError: no jinja2"),
    ],
)
def test_renderer_that_does_not_answer(monkeypatch, tmp_path, program, message):
    renderer = tmp_path / "renderer.py"
    renderer.write_text(
        f"import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n{program}\n"
    )
    monkeypatch.setattr(chat_template, "_RENDERER", renderer)
    with pytest.raises(ValueError, match=rf"hostile\.jinja: .*{message}"):
        render(ChatTemplate("", "hostile.jinja"), [[USER]])


def test_output_of_all_conversations_is_limited(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_TOTAL_CHARACTERS", 10)
    template = ChatTemplate("{{ messages[0].content }}", "hostile.jinja")
    assert render(template, [[USER], [USER]]) == ["hello", "hello"]
    with pytest.raises(ValueError, match="its output exceeds 10 characters in all"):
        render(template, [[USER]] * 3)


def test_limits_leave_room_for_many_conversations(used):
    text = "{% for message in messages %}{{ message.role + message.content | trim }}{% endfor %}"
    widest = "\U0001f642" * 4000
    most = [[{"role": "user", "content": widest}]] * 1000
    found = render(ChatTemplate(text, "honest.jinja"), most)
    assert found == ["user" + widest] * 1000
    assert used().max_bytes < MAX_BYTES
