"""``python -m experiments.train_rl``: the rival, reinforcement learning on the same problems.

Trains a policy from ``--model`` with the program that checks answers as the reward, by RLOO
(``experiments.policy_gradient``). What it cost is counted in the operations in which sampling is
counted. Stopped, it goes on from its last checkpoint.
"""

import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tqdm import tqdm

from ecmh_jax import Config, make_tuning, sample
from experiments import equation_corpus, policy_gradient
from experiments.checkpoints import Checkpoints
from experiments.equations import Equation, draw_equation, read_answer, tries_numbers
from experiments.launch import setting, start
from experiments.policy_gradient import Completions
from experiments.summaries import count_flops
from experiments.training import TrainState, pad_length
from models.config import TransformerConfig
from models.huggingface_writer import write_llama
from models.load import LoadedModel, load_model

_PASSES = 3  # a gradient costs a pass forward and two back
_LAST = 10  # updates over which the reward at the end is averaged


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """One run of the launcher; each field is the flag of that name."""

    output_dir: str | None = setting(None, "The trained model's folder. Required.")
    model: str = setting("tiny", "The policy to begin with, a model of experiments.train_tiny.")
    num_updates: int = setting(200, "Updates of the weights.")
    num_prompts: int = setting(32, "Problems of an update.")
    group_size: int = setting(8, "Completions of each problem.")
    learning_rate: float = setting(1e-4, "Of AdamW, constant.")
    max_new_tokens: int = setting(96, "Longest completion; an unfinished one earns nothing.")
    seed: int = setting(0, "Of problems and draws.")
    checkpoint_every: int = setting(20, "Updates from one checkpoint to the next.")


class Policy:
    """A model under training: draws completions, and learns from them."""

    def __init__(self, config: RlConfig, model: LoadedModel):
        """Starts at the model's own weights."""
        self._config, self._model = config, model
        self._optimiser = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(config.learning_rate, weight_decay=0.0)
        )
        self._update = policy_gradient.build_update(model.config, self._optimiser)
        # Copied, because an update takes its weights' memory.
        params = jax.tree.map(jnp.array, model.params)
        self.state = TrainState(params, self._optimiser.init(params))

    def improve(self, step: int) -> dict[str, Any]:
        """Makes update number ``step``, from 1; returns its row of metrics."""
        started = time.perf_counter()
        config, model = self._config, self._model
        problems = draw_problems(config.seed, step, config.num_prompts)
        repeated = [problem for problem in problems for _ in range(config.group_size)]
        prompts, prompt_lengths = encode_prompts(repeated, model.tokenizer.plain)
        num_rows = len(repeated)
        schedule = Config(
            prompt_length=prompts.shape[1],
            max_new_tokens=config.max_new_tokens,
            num_stages=1,
            steps_per_stage=0,
            top_k=None,
            eos_ids=model.eos_ids,
            pad_id=model.eos_ids[0],
        )
        result = sample(
            jax.random.fold_in(jax.random.key(config.seed), step),
            model.language_model,
            self.state.params,
            jnp.asarray(prompts),
            jnp.asarray(prompt_lengths),
            make_tuning(num_rows),
            schedule,
            sampler="standard",
        )
        tokens, lengths = np.asarray(result.trace.tokens), np.asarray(result.trace.length)
        texts = [
            model.tokenizer.decode(row[start:end])
            for row, start, end in zip(tokens, prompt_lengths, lengths, strict=True)
        ]
        rewards = reward(
            texts, repeated, tokens[np.arange(num_rows), lengths - 1] == model.eos_ids[0]
        )
        longest = pad_length(int(lengths.max()))
        advantages = policy_gradient.leave_one_out(rewards.reshape(-1, config.group_size))
        completions = Completions(
            tokens=jnp.asarray(tokens[:, :longest]),
            prompt_lengths=jnp.asarray(prompt_lengths),
            lengths=jnp.asarray(lengths),
            advantages=jnp.asarray(advantages.reshape(-1)),
        )
        self.state = self._update(self.state, completions)
        return {
            "update": step,
            "reward": float(rewards.mean()),
            "tries_numbers": float(np.mean([tries_numbers(text) for text in texts])),
            "tokens": float(np.mean(lengths - prompt_lengths)),
            "log_prob": float(np.mean(np.sum(result.trace.log_prob, axis=1))),
            "flops": count_update(model.config, prompt_lengths, lengths),
            "seconds": time.perf_counter() - started,
        }


def reward(texts: Sequence[str], problems: Sequence[Equation], ended: np.ndarray) -> np.ndarray:
    """Returns 1 for right answers and 0 for others, [B] float32.

    Args:
      texts: the completions.
      problems: of each.
      ended: whether each ended; one that did not may look like an answer and go on.
    """
    right = [
        read_answer(text) == problem.solution for text, problem in zip(texts, problems, strict=True)
    ]
    return np.asarray(ended & np.array(right), np.float32)


def count_update(config: TransformerConfig, prompt_lengths: np.ndarray, lengths: np.ndarray) -> int:
    """Floating-point operations of drawing completions and of one gradient over their texts.

    Drawing counts as ``summaries.count_flops`` does, the prompts' own pass left out; the gradient
    is three passes over prompt and completion.
    """
    decoded = int(np.sum(lengths - prompt_lengths))
    whole, before = _sum_to(lengths), _sum_to(prompt_lengths)
    drawing = count_flops(config, decoded, whole - before)
    return drawing + _PASSES * count_flops(config, int(np.sum(lengths)), whole)


def _sum_to(lengths: np.ndarray) -> int:
    """Slots attended to by texts of these lengths."""
    return int(np.sum(lengths.astype(np.int64) * (lengths + 1) // 2))


def draw_problems(seed: int, step: int, num_problems: int) -> list[Equation]:
    """Draws the problems of an update; none is held out."""
    rng = random.Random(f"{seed} {step}")
    problems: list[Equation] = []
    while len(problems) < num_problems:
        problem = draw_equation(rng)
        if not equation_corpus.is_held_out(problem):
            problems.append(problem)
    return problems


_PROMPT_SLOTS = 24  # the longest problem takes 19 tokens


def encode_prompts(
    problems: list[Equation], tokenizer: tokenizers.Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts [B, P] int32, padded with 0, and their lengths [B] int32."""
    rows = [tokenizer.encode(problem.prompt).ids for problem in problems]
    lengths = np.array([len(row) for row in rows], np.int32)
    if lengths.max() > _PROMPT_SLOTS:
        raise ValueError(
            f"--model: its tokenizer needs {lengths.max()} tokens for a problem; expected a model "
            f"of experiments.train_tiny, which needs at most {_PROMPT_SLOTS}"
        )
    tokens = np.zeros((len(rows), _PROMPT_SLOTS), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    return tokens, lengths


def run_train_rl(config: RlConfig) -> dict[str, Any]:
    """Trains, or goes on training, and writes the model.

    Returns:
      The content of ``training.json``.

    Raises:
      ValueError: a setting is out of range, or the folder cannot be used.
      OSError: the model cannot be had.
    """
    _check_flags(config)
    model = load_model(config.model, "float32")
    if not model.eos_ids:
        raise ValueError(f"--model={config.model} names no token that ends a completion")
    settings = dataclasses.asdict(config) | {"source": model.source}
    with Checkpoints(settings.pop("output_dir"), settings) as checkpoints:
        folder = checkpoints.folder
        policy = Policy(config, model)
        first, policy.state, metrics = checkpoints.restore(policy.state)
        with tqdm(total=config.num_updates, initial=first, disable=None, unit="update") as bar:
            for step in range(first + 1, config.num_updates + 1):
                metrics.append(policy.improve(step))
                bar.update()
                bar.set_postfix(reward=f"{metrics[-1]['reward']:.2f}")
                if step % config.checkpoint_every == 0 or step == config.num_updates:
                    checkpoints.save(step, policy.state, metrics)
        tokenizer = model.tokenizer.plain
        write_llama(folder, model.config, policy.state.params, tokenizer, model.eos_ids[0])
        summary = {
            "settings": settings,
            "reward_before": metrics[0]["reward"],
            "reward_after": float(np.mean([row["reward"] for row in metrics[-_LAST:]])),
            "completions": config.num_updates * config.num_prompts * config.group_size,
            "flops": sum(row["flops"] for row in metrics),
            "seconds": round(sum(row["seconds"] for row in metrics), 1),
        }
        checkpoints.finish(summary)
    return summary


def _check_flags(config: RlConfig) -> None:
    if not config.output_dir:
        raise ValueError("--output_dir is missing; expected a folder for the trained model")
    for name in ("num_updates", "num_prompts", "max_new_tokens", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)}; expected >= 1")
    if config.group_size < 2:
        raise ValueError(f"--group_size={config.group_size}; expected >= 2, to be compared")
    if not 0 < config.learning_rate < 1:
        raise ValueError(f"--learning_rate={config.learning_rate}; expected 0 < rate < 1")
    if not 0 <= config.seed < 1 << 31:
        raise ValueError(f"--seed={config.seed}; expected 0..{(1 << 31) - 1}")


def _launch(config: RlConfig) -> int:
    summary = run_train_rl(config)
    print(
        f"{summary['reward_before']:.0%} solved before, {summary['reward_after']:.0%} in the last "
        f"updates; {summary['completions']:,} completions, {summary['flops']:.3g} operations, "
        f"{summary['seconds']:.0f} s; sample it with --model={config.output_dir}"
    )
    return 0


if __name__ == "__main__":
    start(RlConfig, _launch)
