"""``python -m experiments.train_tiny``: trains the bundled model ``tiny`` from nothing.

A small transformer on the corpus of ``experiments.equations``. The folder that it writes is a
Hugging Face folder: ``--model=FOLDER`` samples it. The command that made the bundled one stands in
docs/why.md. Stopped, it goes on from its last checkpoint.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from tqdm import tqdm

from experiments import equation_corpus, training
from experiments.checkpoints import Checkpoints
from experiments.launch import setting, start
from experiments.training import Schedule, TrainState
from models.config import TransformerConfig
from models.huggingface_writer import write_llama

_HEAD_SIZE = 32
_CONTEXT_LENGTH = 256
_MOST_TOKENS = 512  # of the vocabulary; the corpus has merges for fewer
_NUM_HELD_OUT = 1000


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of the launcher; each field is the flag of that name."""

    output_dir: str | None = setting(None, "The model's folder. Required.")
    num_examples: int = setting(200_000, "Worked solutions of the corpus.")
    num_steps: int = setting(4000, "Updates of the weights.")
    batch_size: int = setting(64, "Solutions of an update.")
    learning_rate: float = setting(3e-3, "The highest; a cosine falls from there to 0.")
    num_layers: int = setting(4, "Transformer blocks.")
    width: int = setting(128, f"Of the residual stream; a multiple of {_HEAD_SIZE}.")
    seed: int = setting(0, "Of the corpus, the weights and the order.")
    checkpoint_every: int = setting(200, "Updates from one checkpoint to the next.")


def run_train_tiny(config: TrainConfig) -> dict[str, Any]:
    """Trains, or goes on training, and writes the model.

    Returns:
      The content of ``training.json``.

    Raises:
      ValueError: a setting is out of range, or the folder cannot be used.
    """
    _check_flags(config)
    settings = dataclasses.asdict(config)
    folder = settings.pop("output_dir")
    with Checkpoints(folder, settings) as checkpoints:
        folder = checkpoints.folder
        tokenizer = equation_corpus.train_tokenizer(config.seed, _MOST_TOKENS)
        network = describe_network(config, tokenizer.get_vocab_size())
        schedule = Schedule(config.num_steps, config.batch_size, config.learning_rate)
        optimiser = training.build_optimiser(schedule)
        params = training.init_params(network, config.seed)
        first, state, metrics = checkpoints.restore(TrainState(params, optimiser.init(params)))
        update = training.build_update(network, optimiser)
        batches = training.draw_batches(_make_corpus(config, tokenizer), config.batch_size, 0)
        losses: list[Any] = []
        started, worked = time.perf_counter(), time.process_time()
        with tqdm(total=config.num_steps, initial=first, disable=None, unit="update") as bar:
            for step, batch in zip(range(1, config.num_steps + 1), batches, strict=False):
                if step <= first:
                    continue
                state, loss = update(state, *batch)
                losses.append(loss)
                bar.update()
                if step % config.checkpoint_every == 0 or step == config.num_steps:
                    row = {
                        "update": step,
                        "loss": float(np.mean(losses)),
                        "seconds": time.perf_counter() - started,
                        "processor_seconds": time.process_time() - worked,
                    }
                    bar.set_postfix(loss=f"{row['loss']:.4f}")
                    metrics.append(row)
                    checkpoints.save(step, state, metrics)
                    losses, started, worked = [], time.perf_counter(), time.process_time()
        write_llama(folder, network, state.params, tokenizer, equation_corpus.END_ID)
        write_problems(folder / "held_out.jsonl", config.seed)
        summary = {
            "settings": settings,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "loss": metrics[-1]["loss"],
            "seconds": round(sum(row["seconds"] for row in metrics), 1),
            "processor_seconds": round(sum(row["processor_seconds"] for row in metrics), 1),
        }
        checkpoints.finish(summary)
    return summary


def describe_network(config: TrainConfig, vocabulary_size: int) -> TransformerConfig:
    """Returns the shape of the network that is trained."""
    heads = config.width // _HEAD_SIZE
    return TransformerConfig(
        vocabulary_size=vocabulary_size,
        num_layers=config.num_layers,
        embedding_size=config.width,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=_HEAD_SIZE,
        feed_forward_size=config.width * 8 // 3 // 16 * 16,
        context_length=_CONTEXT_LENGTH,
        tied_head=True,
    )


def _make_corpus(config: TrainConfig, tokenizer: tokenizers.Tokenizer) -> equation_corpus.Corpus:
    examples = list(equation_corpus.draw_examples(config.seed + 1, config.num_examples))
    return equation_corpus.encode(examples, tokenizer)


def write_problems(path: Path, seed: int) -> None:
    """Writes held-out problems as the rows that ``--task=equations`` reads."""
    problems = equation_corpus.draw_problems(seed, _NUM_HELD_OUT, held_out=True)
    rows = (
        {"id": index, "problem": problem.prompt, "answer": problem.solution}
        for index, problem in enumerate(problems)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _check_flags(config: TrainConfig) -> None:
    if not config.output_dir:
        raise ValueError("--output_dir is missing; expected a folder for the model")
    for name in ("num_examples", "num_steps", "batch_size", "num_layers", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)}; expected >= 1")
    if config.num_examples < config.batch_size:
        raise ValueError(
            f"--num_examples={config.num_examples}; expected at least --batch_size, "
            f"{config.batch_size}"
        )
    if config.width < _HEAD_SIZE or config.width % _HEAD_SIZE:
        raise ValueError(f"--width={config.width}; expected a multiple of {_HEAD_SIZE}")
    if not 0 < config.learning_rate < 1:
        raise ValueError(f"--learning_rate={config.learning_rate}; expected 0 < rate < 1")
    if not 0 <= config.seed < 1 << 31:
        raise ValueError(f"--seed={config.seed}; expected 0..{(1 << 31) - 1}")


def _launch(config: TrainConfig) -> int:
    summary = run_train_tiny(config)
    print(
        f"{summary['parameters']:,} parameters, loss {summary['loss']:.4f} nats a token after "
        f"{config.num_steps} updates, {summary['seconds']:.0f} s; sample it with "
        f"--model={config.output_dir}"
    )
    return 0


if __name__ == "__main__":
    start(TrainConfig, _launch)
