"""Conversations to prompts, by a model's own chat template.

Templates are programs that come with the weights, so they run in jinja2's immutable sandbox, and
because the sandbox bounds neither memory nor time, in a process of their own that has limits.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.tokenizer import Tokenizer

MAX_TEMPLATE_CHARACTERS = 1 << 17  # the longest in use have some 20,000
MAX_PROMPT_CHARACTERS = 1 << 22
MAX_TOTAL_CHARACTERS = 1 << 24  # of all prompts of a call: 1000 of 16,000 characters
ROLES = ("system", "user", "assistant")
# Processor time, which other load on the machine does not use up. The longest published templates
# take 0.02 s to compile and 0.06 ms a conversation, so that a machine ten times slower has room. A
# call with a hostile template ends within 1.5 s, the start of the process (0.2 s) included.
_CPU_SECONDS = 1.0
_CPU_SECONDS_PER_CONVERSATION = 0.001
# Wall time: for a system without such limits, and generous because an honest template may have to
# share its processor with many others.
_DEADLINE_SECONDS = 20.0
_RENDERER = Path(__file__).with_name("template_renderer.py")
_PRIVATE_USE = range(0xE000, 0xF900)

Message = Mapping[str, str]  # {"role": one of ROLES, "content": text}


class ChatTemplate(NamedTuple):
    """A chat template and the variables that it may use.

    Attributes:
      text: the Jinja source.
      source: the file that it was read from, for messages.
      bos_token: text of the beginning-of-sequence token, or empty.
      eos_token: text of the end-of-sequence token, or empty.
    """

    text: str
    source: str
    bos_token: str = ""
    eos_token: str = ""


def encode_chats(
    template: ChatTemplate, conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer
) -> list[list[int]]:
    """Encodes conversations so that only the template can write special tokens.

    A conversation whose texts hold none of the tokenizer's special tokens is rendered and encoded
    as it is. In any other, the first character of each such place is replaced by a stand-in from
    Unicode's private use area while the template runs; what lies between the special tokens of the
    result is then encoded as ordinary text, with the character back in its place.

    Args:
      template: the model's template.
      conversations: each a sequence of messages; the model's answer comes next.
      tokenizer: the model's tokenizer.

    Returns:
      Token ids of each prompt, BOS included where the template writes it.

    Raises:
      ValueError: for a malformed message, or when the template fails or exceeds its limits.
    """
    for conversation in conversations:
        _check_conversation(conversation)
    special = tokenizer.special_tokens
    stand_ins = _stand_ins(template, conversations, special)
    guarded = [
        [{**message, "content": _guard(message["content"], special, stand_ins)} for message in chat]
        for chat in conversations
    ]
    back = {stand_in: character for character, stand_in in stand_ins.items()}
    return [_encode_guarded(text, tokenizer, back) for text in render(template, guarded)]


def render(template: ChatTemplate, conversations: Sequence[Sequence[Message]]) -> list[str]:
    """Renders every conversation, and the beginning of the model's answer, as one text.

    Args:
      template: the model's template.
      conversations: each a sequence of messages.

    Returns:
      The prompts, in order.

    Raises:
      ValueError: naming the template's file, when it fails or exceeds its limits.
    """
    if len(template.text) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(
            f"{template.source}: the chat template has {len(template.text)} characters; expected "
            f"at most {MAX_TEMPLATE_CHARACTERS}. Pass --nochat to use the prompts as they are"
        )
    # As in transformers, a token that the model does not have is not defined.
    special_texts = {"bos_token": template.bos_token, "eos_token": template.eos_token}
    request = {
        "template": template.text,
        "conversations": [[dict(message) for message in chat] for chat in conversations],
        "variables": {name: text for name, text in special_texts.items() if text},
        "max_characters": MAX_PROMPT_CHARACTERS,
        "max_total_characters": MAX_TOTAL_CHARACTERS,
        "max_cpu_seconds": _CPU_SECONDS + _CPU_SECONDS_PER_CONVERSATION * len(conversations),
    }
    # -P keeps this folder off the path of the new process, where its modules could hide others.
    command = [sys.executable, "-P", str(_RENDERER)]
    reply: dict[str, Any]
    try:
        finished = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_DEADLINE_SECONDS,
            check=False,
        )
        reply = json.loads(finished.stdout)
    except subprocess.TimeoutExpired:
        reply = {"error": f"not done after {_DEADLINE_SECONDS:g} s"}
    except ValueError:  # no reply: it was stopped by a limit, crashed or could not start
        reply = {"error": _why_it_ended(finished, request["max_cpu_seconds"])}
    if "error" in reply:
        raise ValueError(
            f"{template.source}: the chat template failed: {reply['error']}. Pass --nochat to use "
            "the prompts as they are"
        )
    return reply["texts"]


def _why_it_ended(finished: subprocess.CompletedProcess[bytes], max_cpu_seconds: float) -> str:
    """What to say of a renderer that ended without a reply."""
    number = -finished.returncode
    if number == getattr(signal, "SIGPROF", None):  # its timer
        return f"not done after {max_cpu_seconds:.1f} s of processor time"
    if number > 0:  # such as the stack that a value nested a million deep overflows
        return f"it crashed the renderer ({signal.strsignal(number) or f'signal {number}'})"
    last_line = finished.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return last_line or f"the renderer ended with exit code {finished.returncode}"


def _check_conversation(conversation: Sequence[Message]) -> None:
    if not conversation:
        raise ValueError("a conversation has no message; expected one at least")
    for message in conversation:
        if set(message) != {"role", "content"} or message["role"] not in ROLES:
            raise ValueError(f"message {dict(message)!r}; expected a role in {ROLES} and a content")
        if not isinstance(message["content"], str):
            raise ValueError(f"message content {message['content']!r}; expected text")


def _stand_ins(
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    special: Mapping[str, int],
) -> dict[str, str]:
    """First character of a special token -> a private character that occurs nowhere else."""
    used = set(template.text).union(*special)
    used.update(*(message["content"] for chat in conversations for message in chat))
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    first_characters = sorted({token[0] for token in special if token})
    # next() cannot run out for honest input; a text that holds all 6400 is refused.
    stand_ins = dict(zip(first_characters, free, strict=False))
    if len(stand_ins) < len(first_characters):
        raise ValueError("a message uses all of Unicode's private use characters; expected text")
    return stand_ins


def _guard(content: str, special: Mapping[str, int], stand_ins: Mapping[str, str]) -> str:
    """Replaces the first character of every special token in a text, overlapping ones too."""
    if not special:
        return content
    tokens = "|".join(re.escape(token) for token in special if token)
    return re.sub(f"(?=(?:{tokens}))(.)", lambda m: stand_ins[m[1]], content, flags=re.DOTALL)


def _encode_guarded(text: str, tokenizer: Tokenizer, back: Mapping[str, str]) -> list[int]:
    if not any(stand_in in text for stand_in in back):
        return tokenizer.encode_with_special(text)
    restore = str.maketrans(dict(back))
    ids: list[int] = []
    end = 0
    for span in tokenizer.special_spans(text):
        ids += tokenizer.encode(text[end : span.start].translate(restore))
        ids.append(span.token_id)
        end = span.end
    return ids + tokenizer.encode(text[end:].translate(restore))
