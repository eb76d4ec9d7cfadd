"""``python -m experiments.lm_eval_adapter``: lm-evaluation-harness with our samplers as a model.

Registers the model ``ecmh_jax`` and then does what ``python -m lm_eval`` does, with the same
arguments. ``--model_args`` are the fields of ``Settings``; see docs/lm_eval.md.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import logging
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    _HOW = f"{error.name} is not installed; expected pip install -e '.[lm_eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {_HOW}")
    raise ModuleNotFoundError(_HOW, name=error.name) from error

from ecmh_jax import Config, checks
from ecmh_jax.base import LanguageModel, Params
from experiments import arms as arms_lib
from experiments import chains as chains_lib
from experiments import evaluation, jobs, launch, memory, sampler_options
from experiments.prompts import EncodedPrompts, pad_prompts
from models.chat_template import ChatTemplate, Message, encode_chats, render
from models.load import fit_length, load_model
from models.tokenizer import Tokenizer

_LOGGER = logging.getLogger("lm_eval.ecmh_jax")  # shares the harness's handler and level
# What requests call the longest completion; the first that is there counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_CHATS_PER_CALL = 256  # of the process that renders templates, whose output is limited


@dataclasses.dataclass(frozen=True)
class Settings:
    """``--model_args``: flags of experiments.sample, one sampler; ``option`` by semicolons."""

    model: str = "smollm2-135m"
    revision: str | None = None
    dtype: str | None = None
    quantise: str | None = None
    sampler: str = "entropy_cut"
    option: str = ""
    power: float = 4.0
    proposal_temperature: float | None = None
    cut_power: float = 4.0
    uniform_mix: float = 0.0
    top_k: int = 50
    max_new_tokens: int = 256
    num_stages: int = 16
    steps_per_stage: int = 10
    refine_finished: bool = False
    num_slots: str = "auto"
    seed: int = 0


def read_settings(arguments: Mapping[str, Any]) -> Settings:
    """Reads what the harness made of ``--model_args``: it guesses each value's type by its look.

    Raises:
      ValueError: a name is not known or a value not of its kind.
    """
    kinds, values = typing.get_type_hints(Settings), {}
    for name, value in arguments.items():
        if name not in kinds:
            raise ValueError(f"--model_args {name}={value}; expected some of {', '.join(kinds)}")
        kind, *others = typing.get_args(kinds[name]) or (kinds[name],)  # X | None has two
        if kind is str and value is not None:
            value = str(value)  # a folder may be called 135
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) not in (kind, *others):
            expected = {bool: "True or False", int: "an integer", float: "a number", str: "text"}
            raise ValueError(f"--model_args {name}={value}; expected {expected[kind]}")
        values[name] = value
    return Settings(**values)


class Request(NamedTuple):
    """A ``generate_until`` request: where its text ends, and names of what it asks for in vain."""

    context: str
    stops: tuple[str, ...]
    max_tokens: int
    ignored: frozenset[str]


def read_request(arguments: tuple[Any, ...], max_new_tokens: int) -> Request:
    """Reads a request's ``(context, gen_kwargs)``.

    Raises:
      ValueError: it asks for more than ``max_new_tokens`` tokens, or is malformed.
    """
    context, given = arguments
    stops = given.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"a request's until={list(stops)}; expected texts: generation_kwargs")
    lengths = [(name, given[name]) for name in _LENGTHS if given.get(name) is not None]
    name, most = lengths[0] if lengths else (_LENGTHS[0], max_new_tokens)
    if type(most) is not int or not 1 <= most <= max_new_tokens:
        raise ValueError(
            f"a request's {name}={most}; expected an integer in 1..{max_new_tokens}, the length of "
            f"a trace: raise --model_args max_new_tokens, or lower --gen_kwargs {name}"
        )
    return Request(context, tuple(filter(None, stops)), most, given.keys() - {"until", *_LENGTHS})


def cut_completion(tokens: Sequence[int], request: Request, tokenizer: Tokenizer) -> str:
    """Returns a completion's text up to the request's first stop string or token limit."""
    # As stop strings, special tokens are ids: a text does not show them.
    ends = {id_ for token, id_ in tokenizer.special_tokens.items() if token in request.stops}
    kept = itertools.takewhile(lambda token: token not in ends, tokens[: request.max_tokens])
    text = tokenizer.decode(list(kept))
    places = [place for stop in request.stops if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]


def identify(prompts: EncodedPrompts) -> tuple[np.ndarray, np.ndarray]:
    """Returns who each chain is, whatever else a run holds or a cache has answered already.

    A chain's prompt id is 31 bits of the SHA-256 of its prompt's tokens, its chain id the number of
    equal prompts before it; each [N] int32.
    """
    seen: collections.Counter[bytes] = collections.Counter()
    identities = []
    for row, length in zip(prompts.tokens, prompts.lengths, strict=True):
        name = row[:length].astype("<i4").tobytes()
        number = int.from_bytes(hashlib.sha256(name).digest()[:4], "little") >> 1
        identities.append((number, seen[name]))
        seen[name] += 1
    prompt_ids, chain_ids = np.array(identities, np.int32).T
    return prompt_ids, chain_ids


@functools.partial(jax.jit, static_argnames=("model", "num_scored"))
def score_tokens(
    params: Params, tokens: Any, start: Any, *, model: LanguageModel, num_scored: int
) -> tuple[jax.Array, jax.Array]:
    """Scores a text's tokens from ``start`` on by the whole law, neither truncated nor tempered.

    Args:
      params: the weights of ``model``.
      tokens: [1, S] int32, padded on the right; results beyond the text's end mean nothing.
      start: [1] int32, at least 1.
      model: the language model.
      num_scored: tokens that are scored.

    Returns:
      [num_scored] log p, float32 nats, and [num_scored] whether no token is likelier.
    """

    def advance(carry: Any, offset: jax.Array) -> Any:
        logits, cache = carry
        positions = jnp.minimum(start + offset, tokens.shape[1] - 1)
        token = jnp.take(tokens[0], positions)
        law = jax.nn.log_softmax(logits[0].astype(jnp.float32))
        scores = law[token[0]], jnp.argmax(law) == token[0]
        return model.decode(params, token, positions, cache), scores

    read = model.prefill(params, tokens, start, model.init_cache(*tokens.shape))
    return jax.lax.scan(advance, read, jnp.arange(num_scored))[1]


@register_model("ecmh_jax")
class PowerSampler(TemplateLM):
    """Samples of the power distribution, and likelihoods of p itself; methods as in the base.

    Built from the fields of ``Settings``; ValueError and OSError name what is unusable.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._warned: set[str] = set()
        # The harness passes its own, unasked: JAX chooses the device, num_slots is the batch.
        for name in ("batch_size", "max_batch_size", "device"):
            settings.pop(name, None)
        given = self._settings = read_settings(settings)
        self._num_slots = memory.parse_num_slots(given.num_slots)
        if not 0 <= given.seed < 1 << 32:
            raise ValueError(f"--model_args seed={given.seed}; expected 0..{(1 << 32) - 1}")
        sampler, option = given.sampler, filter(None, given.option.split(";"))
        options = sampler_options.read_options((sampler,), tuple(option))
        schedule = given.max_new_tokens, given.num_stages, given.steps_per_stage
        config = Config(1, *schedule, given.top_k or None, refine_finished=given.refine_finished)
        checks.check_config(config)
        numbers = given.power, given.proposal_temperature, given.cut_power, given.uniform_mix
        self._arm = arms_lib.Arm(sampler, sampler, config, *numbers, options=options[sampler])
        self._arm.specialise()  # checks the numbers, before any weight is read
        self._model = load_model(given.model, given.dtype, given.revision, quantise=given.quantise)
        self._special = self._model.tokenizer.special_tokens
        self._chats: dict[str, tuple[Sequence[Message], str]] = {}
        self._encoded_chats: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        if not self._model.eos_ids:
            raise ValueError(f"{self._model.name} has no end-of-sequence token; expected one")
        return self._model.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without context follows: that which begins a text, if any."""
        template = self._model.chat_template
        named = self._special.get(template.bos_token) if template else None
        known = [*self._model.tokenizer.bos_ids, *([] if named is None else [named])]
        return known[0] if known else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that are read at most before a token is scored."""
        return self._model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        return self._model.source.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str):
            raise ValueError(f"--apply_chat_template={chat_template}; expected no name after it")
        return self._require_template().text if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation, and notes which one the text is; else it ends in an answer."""
        messages, beginning = chat_history, ""
        if not add_generation_prompt:
            messages, beginning = chat_history[:-1], chat_history[-1]["content"]
        text = render(self._require_template(), [messages])[0] + beginning
        if self._chats.setdefault(text, (messages, beginning)) != (messages, beginning):
            raise ValueError(f"{messages}; expected no other conversation that renders as this one")
        return text

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        """Encodes a text; special tokens in it are ordinary text."""
        tokenizer = self._model.tokenizer
        return (tokenizer.encode_prompt, tokenizer.encode)[add_special_tokens is False](string)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        if not requests:
            return []
        most = self._settings.max_new_tokens
        asked = [read_request(request.args, most) for request in requests]
        if ignored := sorted(set().union(*(request.ignored for request in asked))):
            self._warn_once(f"{', '.join(ignored)} of requests ignored: --model_args stand for it")
        if any(request.max_tokens < most for request in asked):
            self._warn_once("shorter texts than max_new_tokens are the beginnings of longer traces")
        job, memory_of_job = self._make_job([request.context for request in asked])
        starts, texts = job.chains.prompt_lengths, [""] * len(requests)
        try:
            for finished in jobs.run_job(job, jobs.make_progress(job)):
                for place, (trace, _, finite, _) in finished.items():
                    tokens = trace.tokens[starts[place] : int(trace.length)].tolist()
                    texts[place] = cut_completion(tokens, asked[place], self._model.tokenizer)
                    if not finite:
                        self._warn_once("some traces end early: their logits were not finite")
                    arguments = requests[place].args
                    self.cache_hook.add_partial("generate_until", arguments, texts[place])
        except jax.errors.JaxRuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            raise memory.out_of_memory(memory_of_job) from error
        return texts

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        if not all(any(request.args) for request in requests):
            raise ValueError("a request has neither context nor continuation; expected some text")
        self._encode_contexts([request.args[0] for request in requests])  # all chats together
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in tqdm(requests, desc="scoring", disable=disable_tqdm or None):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            scores = [self._score(*make_disjoint_window(window)) for window in windows]
            totals.append(sum(log_prob for log_prob, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        results = []
        hidden = kwargs.get("disable_tqdm") or None
        for arguments, context, scored in tqdm(requests, desc="scoring", disable=hidden):
            results.append(self._score(context, scored))
            self.cache_hook.add_partial("loglikelihood", arguments, results[-1])
        return results

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context not in self._chats:
            pair = super()._encode_pair(context, continuation)
            # Encoded together, a short continuation can vanish in the context's last token.
            if pair[1] or not continuation:
                return pair
        scored = self.tok_encode(continuation, add_special_tokens=False)
        return self._encode_contexts([context])[0], scored

    def _encode_contexts(self, contexts: Sequence[str]) -> list[list[int]]:
        """Encodes prompts; in those that a chat template wrote, its special tokens are tokens."""
        tokenizer, chats, known = self._model.tokenizer, self._chats, self._encoded_chats
        waiting = [text for text in {*contexts} if text in chats and text not in known]
        for first in range(0, len(waiting), _CHATS_PER_CALL):
            texts = waiting[first : first + _CHATS_PER_CALL]
            messages = [chats[text][0] for text in texts]
            encoded = encode_chats(self._require_template(), messages, tokenizer)
            for text, tokens in zip(texts, encoded, strict=True):
                known[text] = tokens + tokenizer.encode(chats[text][1])
        if any(token in text for text in {*contexts} - chats.keys() for token in self._special):
            self._warn_once(
                "prompts hold special tokens that are read as ordinary text; if a chat template "
                "wrote them, --cache_requests kept them from an earlier run: leave it out"
            )
        return [
            known.get(text) or tokenizer.encode_prompt(text) or [self.prefix_token_id]
            for text in contexts
        ]

    def _make_job(self, contexts: Sequence[str]) -> tuple[jobs.Job, memory.Reservation]:
        eos_ids = self._model.eos_ids
        pad_id = eos_ids[0] if eos_ids else 0
        prompts = pad_prompts(contexts, self._encode_contexts(contexts), pad_id)
        shape = {"prompt_length": prompts.tokens.shape[1], "eos_ids": eos_ids, "pad_id": pad_id}
        config = dataclasses.replace(self._arm.config, **shape)
        arm = dataclasses.replace(self._arm, config=config)
        chains_lib.check(self._model, prompts, config)
        longest = int(prompts.lengths.max()) + config.max_new_tokens
        self._model = fit_length(self._model, longest)
        demands = evaluation.demands([arm], len(contexts))
        reserved = memory.reserve(self._num_slots, self._model, demands)
        cells = [arms_lib.Cell(0, place, 0) for place in range(len(contexts))]
        prompt_ids, chain_ids = identify(prompts)
        chains = arms_lib.lay_out([arm], prompts, cells)
        chains = chains._replace(prompt_ids=prompt_ids, chain_ids=chain_ids)
        of_run = arm.sampler, jax.random.key(self._settings.seed), self._model, chains
        return jobs.Job(*of_run, demands[0].config, reserved.num_slots, arm.options), reserved

    def _score(self, context: list[int], scored: list[int]) -> tuple[float, bool]:
        """Returns log p of a continuation and whether it is the greedy one.

        One text at a time, so that nothing depends on the others. What is too long loses the
        beginning of its context, as with the harness's own models; the last token is not read.
        """
        if not scored:
            return 0.0, True
        room = self.max_length + 1 - len(scored)
        if room < 1:
            most = f"{self.max_length}, the context of {self._model.name}"
            raise ValueError(f"a continuation has {len(scored)} tokens; expected at most {most}")
        if len(context) > room:
            self._warn_once("contexts are longer than the model's: their beginnings are cut off")
        text = context[-room:] + scored
        padded = pad_prompts([""], [text], pad_id=0)
        # Again the one before where nothing depends on the length, so that it is compiled once.
        self._model = fit_length(self._model, len(text))
        arguments = self._model.params, padded.tokens, padded.lengths - len(scored)
        count = 1 << (len(scored) - 1).bit_length()  # few programs
        language_model = self._model.language_model
        log_prob, greedy = score_tokens(*arguments, model=language_model, num_scored=count)
        known = np.asarray(log_prob, np.float64)[: len(scored)]
        return float(known.sum()), bool(np.asarray(greedy)[: len(scored)].all())

    def _require_template(self) -> ChatTemplate:
        if template := self._model.chat_template:
            return template
        raise ValueError(f"--apply_chat_template, but {self._model.name} has no chat template")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _LOGGER.warning("%s", message)


def main() -> None:
    """Runs the harness's command line; does not return."""
    # Only here: it is the harness's program, which importing this model should not start.
    from lm_eval.__main__ import cli_evaluate

    launch.run_main(sys.argv[:1], lambda: cli_evaluate() or 0)


if __name__ == "__main__":
    main()
