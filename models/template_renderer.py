"""Renders chat templates, as a program of its own with limits on memory, time and files.

Reads one JSON request from standard input and writes one JSON reply to standard output:
``{"template", "conversations", "variables", "max_characters", "max_total_characters",
"max_cpu_seconds"}`` gives ``{"texts": [...]}`` or ``{"error": "..."}``. Started by
``models.chat_template``, never imported: jinja2's sandbox keeps a template from reaching Python,
but not from asking for gigabytes or for a loop without end.
"""

import contextlib
import importlib
import json
import signal
import sys
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Python and jinja2 take 25 MB; the longest reply that is allowed, in its widest characters, 600 MB.
MAX_BYTES = 768 << 20
MAX_ERROR_CHARACTERS = 500
# What jinja2 and its parts import when a template first needs it, which under the limits is too
# late: no file can be opened any more.
LATE_IMPORTS = (
    "encodings.unicode_escape",  # any text literal
    "html",  # striptags
    "jinja2.constants",  # lipsum
    "jinja2.debug",  # any error
    "pprint",
    "textwrap",  # wordwrap
)


class GenerationExtension(jinja2.ext.Extension):
    """Accepts Hugging Face's ``{% generation %}`` blocks, which matter for training only."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def limit_resources(max_cpu_seconds: float) -> None:
    """Limits this process where the system can; elsewhere the caller's deadline remains."""
    for name in LATE_IMPORTS:
        importlib.import_module(name)
    try:
        import resource  # Unix only
    except ImportError:
        return
    limits = (
        (resource.RLIMIT_AS, MAX_BYTES),
        (resource.RLIMIT_NOFILE, 0),  # should the sandbox leak, there is still nothing to read
        (resource.RLIMIT_CORE, 0),  # a crash leaves no image of the conversations on the disk
    )
    for kind, most in limits:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses to limit memory
            resource.setrlimit(kind, (most, most))
    # A timer, because RLIMIT_CPU knows whole seconds only and counts the start of the process.
    # It stops long work inside C as well; an ignored or blocked signal would be inherited.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    signal.setitimer(signal.ITIMER_PROF, max_cpu_seconds)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Returns the sandbox with what Hugging Face's templates may use.

    ``strftime_now`` is left out: a prompt that holds today's date is another one tomorrow, and
    templates that know it do without it where it is not defined.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationExtension, "jinja2.ext.loopcontrols"],
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ) -> str:
        # Jinja's own filter escapes HTML, which no model was trained on.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment


def render(request: dict[str, Any]) -> list[str]:
    """Renders every conversation of a request."""
    template = make_environment().from_string(request["template"])
    texts = []
    total_left = request["max_total_characters"]
    for messages in request["conversations"]:
        parts: list[str] = []
        left = request["max_characters"]
        for part in template.generate(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **request["variables"],
        ):
            left -= len(part)
            total_left -= len(part)
            if left < 0:
                raise OverflowError(f"its output exceeds {request['max_characters']} characters")
            if total_left < 0:
                most = request["max_total_characters"]
                raise OverflowError(f"its output exceeds {most} characters in all")
            parts.append(part)
        texts.append("".join(parts))
    return texts


def describe(error: Exception) -> str:
    """One line about an error, whose text may be the template's: no control characters."""
    text = " ".join(str(error)[:MAX_ERROR_CHARACTERS].split())
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return f"{type(error).__name__}: {text.rstrip('.')}"


def main() -> None:
    """Answers the one request."""
    request = json.load(sys.stdin.buffer)
    # Made while there is memory.
    out_of_memory = json.dumps({"error": f"it needs more than {MAX_BYTES >> 20} MiB of memory"})
    limit_resources(request["max_cpu_seconds"])
    try:
        reply = json.dumps({"texts": render(request)})
    except MemoryError:
        reply = out_of_memory
    except Exception as error:  # a template can raise anything
        reply = json.dumps({"error": describe(error)})
    # Not in the handlers above: here what the failed template had asked for is free again.
    print(reply)


if __name__ == "__main__":
    main()
