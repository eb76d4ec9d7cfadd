"""An evaluation: problems x arms x seeds, each a chain, graded and kept as it finishes."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import ecmh_jax
from ecmh_jax.engine import Finished
from experiments import arms as arms_lib
from experiments import chains as chains_lib
from experiments import history as history_lib
from experiments import jobs as jobs_lib
from experiments import memory as memory_lib
from experiments import summaries
from experiments.arms import Arm, Cell
from experiments.evaluation_store import EvaluationStore, Key, Row
from experiments.grading.grader import Grader
from experiments.jobs import Job
from experiments.progress import GroupProgress, Progress
from experiments.prompts import EncodedPrompts, pad_prompts
from experiments.tasks import Problem, make_prompt
from models.chat_template import encode_chats
from models.load import LoadedModel

_FINGERPRINT_ELEMENTS = 256  # of each leaf
_DIGITS = 4  # of a token's log p and entropy


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an evaluation consists of.

    Attributes:
      task: one of ``tasks.TASKS``.
      problems: its problems, in the order of their rows.
      prompts: their prompts.
      arms: the arms, in the order in which they run.
      seeds: chains of each problem and arm.
      seed: of the random numbers: chain ``s`` draws from it, the problem's place and ``s``.
      num_slots: rows that decode together.
      record_problems: of so many problems, the first ones, every step of the first seed is kept.
      together: whether arms that can share a program share the slots too, as in a sweep.
    """

    task: str
    problems: tuple[Problem, ...]
    prompts: EncodedPrompts
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    seed: int
    num_slots: int
    record_problems: int
    together: bool

    def wanted(self) -> Iterator[Key]:
        """Every row that a complete evaluation has, in order."""
        for arm in self.arms:
            for problem in self.problems:
                for seed in self.seeds:
                    yield arm.name, problem.problem_id, seed


def encode_problems(
    task: str, problems: Sequence[Problem], model: LoadedModel, chat: bool, pad_id: int
) -> EncodedPrompts:
    """Encodes the prompts of problems.

    Args:
      task: one of ``tasks.TASKS``.
      problems: the problems.
      model: whose tokenizer and chat template to use.
      chat: whether to apply the chat template, where the task's prompt is not raw.
      pad_id: fills the slots after a prompt.

    Raises:
      ValueError: ``chat`` is asked of a model without a template, or the template fails.
    """
    if chat and model.chat_template is None:
        raise ValueError(f"--chat, but {model.name} has no chat template; leave the flag out")
    prompts = [make_prompt(task, problem, chat) for problem in problems]
    encoded: list[list[int]] = [[] for _ in prompts]
    chats = []
    for place, prompt in enumerate(prompts):
        if prompt.raw or model.chat_template is None:
            encoded[place] = model.tokenizer.encode_prompt(prompt.text)
        else:
            system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
            chats.append((place, [*system, {"role": "user", "content": prompt.text}]))
    if chats and model.chat_template is not None:
        conversations = [messages for _, messages in chats]
        rendered = encode_chats(model.chat_template, conversations, model.tokenizer)
        for (place, _), tokens in zip(chats, rendered, strict=True):
            encoded[place] = tokens
    return pad_prompts([prompt.text for prompt in prompts], encoded, pad_id)


def describe_settings(plan: Plan, model: LoadedModel, data: dict[str, Any]) -> dict[str, Any]:
    """Returns ``settings.json``: all that a row depends on, the machine's kind included."""
    device = jax.devices()[0]
    return {
        "task": plan.task,
        "data": data,
        "problems": [problem.problem_id for problem in plan.problems],
        "prompts": hashlib.sha256(plan.prompts.tokens.tobytes()).hexdigest()[:16],
        "model": {
            "name": model.name,
            "source": model.source,
            "dtype": str(model.dtype),
            "weights": model.quantised or str(model.dtype),
            "fingerprint": fingerprint(model),
            "needed_length": model.needed_length,
        },
        "config": {
            name: getattr(plan.arms[0].config, name)
            for name in ("prompt_length", "max_new_tokens", "num_stages", "top_k")
        },
        "seed": plan.seed,
        "num_slots": plan.num_slots,
        "record_problems": plan.record_problems,
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": {"ecmh_jax": ecmh_jax.__version__, "jax": jax.__version__},
        "samplers": {arm.name: _plain(arm.describe()) for arm in plan.arms},
    }


def fingerprint(model: LoadedModel) -> str:
    """Returns 16 hexadecimal digits that tell other weights from these, by a part of each leaf."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        step = max(1, leaf.size // _FINGERPRINT_ELEMENTS)
        digest.update(np.asarray(leaf.reshape(-1)[::step]).tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """What JSON makes of a value, so that it can be compared with what a file holds."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def check(plan: Plan, model: LoadedModel) -> None:
    """Raises ValueError unless every arm can run on this model with these prompts."""
    for arm in plan.arms:
        arm.specialise()
        chains_lib.check(model, plan.prompts, arm.config)
        if arm.match is not None and arm.match not in [other.name for other in plan.arms]:
            raise ValueError(
                f"--match={arm.match}; expected one of --samplers, which {arm.name} can follow, or "
                "'none'"
            )


def demands(arms: Sequence[Arm], num_chains: int) -> list[memory_lib.Demand]:
    """What the arms ask of the memory."""
    return [
        memory_lib.Demand(
            arm.sampler,
            arm.specialise()[1],
            *jobs_lib.rows_of(arm.sampler, arm.options, num_chains),
        )
        for arm in arms
    ]


def run(plan: Plan, model: LoadedModel, store: EvaluationStore, grader: Grader) -> int:
    """Runs what the store does not hold yet, and sorts its rows once all are there.

    Args:
      plan: the evaluation, checked; its settings are the store's.
      model: the model.
      store: receives rows as chains finish.
      grader: grades them.

    Returns:
      Rows added.
    """
    added = 0
    for arms in _batches(plan):
        cells = [
            Cell(number, place, seed)
            for number, arm in enumerate(arms)
            for place, problem in enumerate(plan.problems)
            for seed in plan.seeds
            if (arm.name, problem.problem_id, seed) not in store.rows
        ]
        if cells:
            added += _run_cells(plan, model, store, grader, arms, cells)
    used = {token for row in store.rows.values() for token in row["tokens"]}
    store.add_pieces(history_lib.describe_pieces(model, used))
    if all(key in store.rows for key in plan.wanted()):
        store.sort(plan.wanted())
    return added


def _batches(plan: Plan) -> Iterator[list[Arm]]:
    """Arms that run in the same slots: one by one, or all that share a program."""
    waiting = list(plan.arms)
    while waiting:
        first = waiting.pop(0)
        batch = [first]
        if plan.together and first.match is None:
            program = _program_of(first)
            batch += [arm for arm in waiting if arm.match is None and _program_of(arm) == program]
            waiting = [arm for arm in waiting if arm not in batch]
        yield batch


def _program_of(arm: Arm) -> tuple[Any, ...]:
    sampler = None if arm.options is None else arm.sampler
    return sampler, arm.specialise()[1], arm.options


def _run_cells(
    plan: Plan,
    model: LoadedModel,
    store: EvaluationStore,
    grader: Grader,
    arms: Sequence[Arm],
    cells: Sequence[Cell],
) -> int:
    job = _make_job(plan, model, store, arms, cells)
    progress = jobs_lib.make_progress(job)
    decoded: dict[str, list[int]] = {}
    try:
        for finished in jobs_lib.run_job(job, progress):
            chains = sorted(finished.items())
            rows = [
                _describe(plan, store, job, arms, cells[index], index, chain)
                for index, chain in chains
            ]
            grades = grader.grade_many(
                plan.task,
                [plan.problems[cells[index].problem] for index, _ in chains],
                [row["text"] for row in rows],
            )
            for row, grade in zip(rows, grades, strict=True):
                row.update(answer=grade.answer, correct=grade.correct, note=grade.note)
            recorded = [
                history_lib.describe(
                    arms[cell.arm],
                    plan.problems[cell.problem],
                    cell.seed,
                    plan.prompts.texts[cell.problem],
                    chain,
                    job,
                )
                for index, chain in chains
                if _is_recorded(plan, job, cell := cells[index])
            ]
            store.add(rows, recorded)
            for row in rows:
                decoded.setdefault(row["sampler"], []).append(row["decoded_tokens"])
    finally:
        if progress.seconds:
            _add_sessions(store, arms, progress, decoded)
    return sum(map(len, decoded.values()))


def _make_job(
    plan: Plan,
    model: LoadedModel,
    store: EvaluationStore,
    arms: Sequence[Arm],
    cells: Sequence[Cell],
) -> Job:
    first = arms[0]
    config = first.specialise()[1]
    if plan.record_problems and config.steps_per_stage and first.options is None:
        config = dataclasses.replace(config, record_proposals=True)
    budget = None
    if first.match is not None:
        matched = [
            store.rows[first.match, plan.problems[cell.problem].problem_id, cell.seed]
            for cell in cells
        ]
        budget = np.array([max(1, row["decoded_tokens"]) for row in matched])
    return Job(
        sampler=first.sampler,
        rng_key=jax.random.key(plan.seed),
        model=model,
        chains=arms_lib.lay_out(arms, plan.prompts, cells),
        config=config,
        num_slots=plan.num_slots,
        options=first.options,
        budget=budget,
    )


def _is_recorded(plan: Plan, job: Job, cell: Cell) -> bool:
    return (
        job.config.record_proposals
        and cell.problem < plan.record_problems
        and cell.seed == plan.seeds[0]
    )


def _add_sessions(
    store: EvaluationStore,
    arms: Sequence[Arm],
    progress: Progress | GroupProgress,
    decoded: Mapping[str, Sequence[int]],
) -> None:
    """Notes what the arms took; those that shared the slots share the time by their tokens.

    Args:
      store: the folder.
      arms: that ran together.
      progress: what they did.
      decoded: by arm, the tokens of each row that was added.
    """
    total = sum(map(sum, decoded.values()))
    for arm in arms:
        counts = decoded.get(arm.name, ())
        share = sum(counts) / total if total else 1 / len(arms)
        with contextlib.suppress(OSError):  # the rows matter more
            store.add_session(
                {
                    "sampler": arm.name,
                    "seconds": round(progress.seconds * share, 3),
                    "compile_seconds": round(progress.compile_seconds * share, 3),
                    "forwards": progress.forwards if len(arms) == 1 else None,
                    "decoded_tokens": sum(counts),
                    "rows": len(counts),
                }
            )


def _describe(
    plan: Plan,
    store: EvaluationStore,
    job: Job,
    arms: Sequence[Arm],
    cell: Cell,
    index: int,
    finished: Finished,
) -> Row:
    """Returns a chain's row, not graded yet."""
    arm, problem = arms[cell.arm], plan.problems[cell.problem]
    row = summaries.describe_chain(
        arm.sampler, job.chains, index, finished, None, job.model, job.config
    )
    start, end = int(job.chains.prompt_lengths[index]), int(finished.trace.length)
    for name in ("prompt_id", "chain", "forwards", "sampler"):
        del row[name]
    return {
        "task": plan.task,
        "problem": problem.problem_id,
        "sampler": arm.name,
        "seed": cell.seed,
        "settings": store.hash_of(arm.name),
        **row,
        "gold": problem.gold,
        "token_log_prob": _rounded(finished.trace.log_prob[start:end]),
        "token_entropy": _rounded(finished.trace.entropy[start:end]),
    }


def _rounded(values: jax.Array) -> list[float | None]:
    return [round(float(value), _DIGITS) if np.isfinite(value) else None for value in values]
