"""Prompts: from a flag or a file to padded token ids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.chat_template import encode_chats
from models.load import LoadedModel

# The demonstration's own, for a small instruction-tuned model: each has decisions to make early.
DEMONSTRATION = (
    "A baker sells 12 rolls in the morning and twice as many in the afternoon. "
    "How many rolls is that in total?",
    "Which is heavier, a kilogram of feathers or a kilogram of iron? Explain in one sentence.",
    "A train travels 60 km in 45 minutes. What is its speed in km per hour?",
)
_BUCKET = 32  # prompt slots are rounded up to a multiple, so that few shapes are compiled


class EncodedPrompts(NamedTuple):
    """Prompts ready for the sampler.

    Attributes:
      texts: what the user wrote.
      tokens: [num_prompts, P] int32, padded on the right.
      lengths: [num_prompts] int32.
    """

    texts: tuple[str, ...]
    tokens: np.ndarray
    lengths: np.ndarray


def read_prompts(path: str) -> tuple[str, ...]:
    """Reads prompts: one a line, or JSON Lines with a string ``prompt`` in every row.

    Args:
      path: the file; a name that ends in .jsonl is JSON Lines, any other plain text. Blank lines
        are skipped. A ``question`` takes the place of a ``prompt`` that is not there, as in GSM8K.

    Raises:
      ValueError: the file cannot be read, holds no prompt, or a row is malformed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts_file={path} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--prompts_file={path} holds no prompt; expected one a line")
    if not path.endswith(".jsonl"):
        return tuple(line for _, line in numbered)
    return tuple(_prompt_of_row(path, number, line) for number, line in numbered)


def _prompt_of_row(path: str, number: int, line: str) -> str:
    expected = 'expected a JSON object with a string "prompt" or "question"'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"--prompts_file={path}, line {number}: {error}; {expected}") from error
    prompt = row.get("prompt", row.get("question")) if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"--prompts_file={path}, line {number}: {line[:80]}; {expected}")
    return prompt


def encode_prompts(
    texts: Sequence[str], model: LoadedModel, chat: bool | None, pad_id: int
) -> EncodedPrompts:
    """Encodes prompts and pads them to a common number of slots.

    Args:
      texts: the prompts; special tokens in them are read as ordinary text.
      model: whose tokenizer and chat template to use.
      chat: whether to apply the chat template; None applies it where the model has one.
      pad_id: fills the slots after a prompt.

    Raises:
      ValueError: a prompt is empty, or ``chat`` is asked of a model without a template.
    """
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"prompt {index} is {text!r}; expected some text: --prompt")
    if chat is None:
        chat = model.chat_template is not None
    if chat:
        if model.chat_template is None:
            raise ValueError(f"--chat, but {model.name} has no chat template; leave the flag out")
        conversations = [[{"role": "user", "content": text}] for text in texts]
        encoded = encode_chats(model.chat_template, conversations, model.tokenizer)
    else:
        encoded = [model.tokenizer.encode_prompt(text) for text in texts]
    return pad_prompts(texts, encoded, pad_id)


def pad_prompts(
    texts: Sequence[str], encoded: Sequence[Sequence[int]], pad_id: int
) -> EncodedPrompts:
    """Pads token ids to a common number of slots."""
    lengths = np.asarray([len(tokens) for tokens in encoded], np.int32)
    slots = -(-int(lengths.max()) // _BUCKET) * _BUCKET
    padded = np.full((len(encoded), slots), pad_id, np.int32)
    for row, tokens in zip(padded, encoded, strict=True):
        row[: len(tokens)] = tokens
    return EncodedPrompts(tuple(texts), padded, lengths)
