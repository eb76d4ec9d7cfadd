"""The corpus of ``experiments.equations`` as token arrays, and the tokenizer made for it."""

import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments.equations import Equation, draw_equation, draw_solution

END = "<|end|>"
END_ID = 0
_HELD_OUT_SHARE = 50  # one problem in so many is never trained on
_TOKENIZER_TEXTS = 4000


class Example(NamedTuple):
    """One problem with one worked solution, as texts."""

    prompt: str
    solution: str


def is_held_out(equation: Equation) -> bool:
    """Whether a problem is kept from training: decided by its text alone."""
    return zlib.crc32(equation.prompt.encode()) % _HELD_OUT_SHARE == 0


def draw_problems(seed: int, num_problems: int, held_out: bool) -> list[Equation]:
    """Draws different problems, either all held out or none.

    Args:
      seed: of the draw.
      num_problems: how many; there are some 50,000 problems, and 1,000 of them are held out.
      held_out: which kind.
    """
    rng = random.Random(seed)
    found: dict[str, Equation] = {}
    while len(found) < num_problems:
        equation = draw_equation(rng)
        if is_held_out(equation) == held_out:
            found.setdefault(equation.prompt, equation)
    return list(found.values())


def draw_examples(seed: int, num_examples: int) -> Iterator[Example]:
    """Draws the training corpus: problems that are not held out, a solution for each."""
    rng = random.Random(seed)
    drawn = 0
    while drawn < num_examples:
        equation = draw_equation(rng)
        if not is_held_out(equation):
            yield Example(equation.prompt, draw_solution(equation, rng))
            drawn += 1


def train_tokenizer(seed: int, vocabulary_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE tokenizer on the corpus; digits stay single tokens.

    Args:
      seed: of the texts.
      vocabulary_size: V, more than the 256 bytes and the end of a text.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ("".join(example) for example in draw_examples(seed, _TOKENIZER_TEXTS))
    backend.train_from_iterator(texts, trainer)
    return backend


class Corpus(NamedTuple):
    """Token rows in order of their length.

    Attributes:
      tokens: [N, S] int32: prompt, solution, end, padding with the end's id.
      prompt_lengths: [N] int32.
      lengths: [N] int32, prompt, solution and end; ascending.
    """

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray


def encode(examples: list[Example], tokenizer: tokenizers.Tokenizer) -> Corpus:
    """Encodes examples, sorted by length so that batches pad little."""
    prompts = tokenizer.encode_batch_fast([example.prompt for example in examples])
    solutions = tokenizer.encode_batch_fast([example.solution for example in examples])
    rows = [
        (prompt.ids, [*solution.ids, END_ID])
        for prompt, solution in zip(prompts, solutions, strict=True)
    ]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    lengths = np.asarray([len(prompt) + len(solution) for prompt, solution in rows], np.int32)
    tokens = np.full((len(rows), int(lengths[-1])), END_ID, np.int32)
    for row, (prompt, solution) in enumerate(rows):
        tokens[row, : lengths[row]] = [*prompt, *solution]
    prompt_lengths = np.asarray([len(prompt) for prompt, _ in rows], np.int32)
    return Corpus(tokens, prompt_lengths, lengths)
