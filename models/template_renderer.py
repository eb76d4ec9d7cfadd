"""Renders chat templates, as a program of its own with limits on memory and time.

Reads one JSON request from standard input and writes one JSON reply to standard output:
``{"template", "conversations", "variables", "max_characters"}`` gives ``{"texts": [...]}`` or
``{"error": "..."}``. Started by ``models.chat_template``, never imported: jinja2's sandbox keeps a
template from reaching Python, but not from asking for gigabytes or for a loop without end.
"""

import contextlib
import json
import sys
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_BYTES = 1 << 30
MAX_CPU_SECONDS = 10


class GenerationExtension(jinja2.ext.Extension):
    """Accepts Hugging Face's ``{% generation %}`` blocks, which matter for training only."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def limit_resources() -> None:
    """Limits this process where the system can; elsewhere the caller's deadline remains."""
    try:
        import resource  # Unix only
    except ImportError:
        return
    limits = ((resource.RLIMIT_AS, MAX_BYTES), (resource.RLIMIT_CPU, MAX_CPU_SECONDS))
    for kind, most in limits:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses to limit memory
            resource.setrlimit(kind, (most, most))


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
            if left < 0:
                raise OverflowError(f"its output exceeds {request['max_characters']} characters")
            parts.append(part)
        texts.append("".join(parts))
    return texts


def main() -> None:
    """Answers the one request."""
    request = json.load(sys.stdin.buffer)
    limit_resources()
    try:
        reply = {"texts": render(request)}
    except MemoryError:
        reply = {"error": f"it needs more than {MAX_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a template can raise anything
        reply = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
