"""``python -m experiments.suffix_divergence``: do continuations part where entropy jumps up?

The paper's study of where decisions fall. Each problem gets one low-temperature trace. It is cut
at tokens of the top and of the bottom decile of upward entropy jumps, and from each cut several
suffixes are drawn: how far apart are they, and how many answers do they reach? Rows are kept as
cuts finish; the same command does what is missing. See docs/suffix_divergence.md.
"""

import collections
import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecmh_jax import Config
from ecmh_jax.engine import Finished
from experiments import arms as arms_lib
from experiments import chains as chains_lib
from experiments import evaluation, memory
from experiments import jobs as jobs_lib
from experiments.arms import Arm, Cell
from experiments.divergence_cuts import KINDS, Cut, CutRule, choose_cuts
from experiments.divergence_store import DivergenceStore
from experiments.edit_distance import mean_edit_distance
from experiments.evaluation import Plan
from experiments.evaluation_flags import choose_problems
from experiments.evaluation_store import Row
from experiments.grading.grader import Grade, Grader, same_answer_key
from experiments.jobs import Job
from experiments.launch import setting, start
from experiments.prompts import EncodedPrompts, pad_prompts
from experiments.reporting import divergence_figure, figures, tables
from experiments.tasks import TASKS, Problem, get_task
from models.load import DTYPES, LoadedModel, fit_length, load_model
from models.quantisation import KINDS as QUANTISATIONS

_DIGITS = 6  # of an entropy
_TASKS = tuple(name for name, task in TASKS.items() if task.grading != "program")
_SUFFIX_SAMPLERS = ("low_temperature", "standard")
_LEAST = dict.fromkeys(("cuts", "distance", "suffix_tokens", "max_new_tokens"), 1)
_LEAST |= {"resamples": 2, "top_k": 0}
_SHOWN = 40  # characters of an answer that a row keeps


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """One run of the launcher; each field is the flag of that name."""

    task: str = setting("gsm8k", "The data set; programs have no answer to compare.", _TASKS)
    data: str | None = setting(None, "Its file, as published; see docs/evaluation.md. Required.")
    problems: str = setting("all", "Which of them, by their places in the file: 0-19 or all.")
    model: str = setting("smollm2-135m", "As in experiments.sample.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub id.")
    dtype: str | None = setting(None, "Default: float32 on CPU, bfloat16 elsewhere.", DTYPES)
    quantise: str | None = setting(None, "As in experiments.sample.", QUANTISATIONS)
    chat: bool | None = setting(None, "As in experiments.evaluate.")
    power: float | None = setting(None, "Traces have temperature 1 / power. Default: the task's.")
    top_k: int | None = setting(None, "Truncation of p; 0 for none. Default: the task's.")
    max_new_tokens: int | None = setting(None, "Longest trace. Default: the task's.")
    cuts: int = setting(5, "Cuts of each kind in a trace; fewer where no more fit.")
    distance: int = setting(10, "Tokens that cuts of one kind are apart, at least.")
    margin: float = setting(0.05, "Share of the trace at either end that is not cut.")
    decile: float = setting(0.1, "Share of the tokens whose jumps are the top, or the bottom.")
    resamples: int = setting(16, "Suffixes of each cut.")
    suffix_tokens: int = setting(192, "Longest suffix.")
    suffix_sampler: str = setting("low_temperature", "Draws suffixes.", _SUFFIX_SAMPLERS)
    seed: int = setting(0, "Seed of the run, from which everything draws.")
    num_slots: str = setting("auto", "As in experiments.sample.")
    grading_workers: int = setting(2, "Processes that grade answers.")
    grading_seconds: float = setting(5.0, "Time that grading one answer may take.")
    output_dir: str | None = setting(None, "The study's folder. Required.")


def run_suffix_divergence(config: DivergenceConfig) -> dict[str, Any]:
    """Does what the folder does not hold yet.

    Returns:
      The content of ``summary.json``, with "left_out", why there is no figure, or None.

    Raises:
      ValueError: a setting or a file is unusable; the message names it.
      OSError: the model cannot be had.
    """
    data = _check_flags(config)
    problems = choose_problems(config.task, str(data), config.problems, config.seed)
    with (
        Grader(config.grading_workers, config.grading_seconds) as grader,
        DivergenceStore(config.output_dir or "") as store,
    ):
        grader.check(config.task)
        model = load_model(config.model, config.dtype, config.revision, quantise=config.quantise)
        plan, model = _make_plan(config, model, problems, store)
        described = {"file": data.name, "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}
        rule = CutRule(config.cuts, config.distance, config.margin, config.decile)
        store.adopt(
            evaluation.describe_settings(plan, model, described)
            | rule._asdict()
            | {"resamples": config.resamples}
        )
        _draw_traces(plan, model, store, grader)
        cuts = [
            cut
            for problem in problems
            if (trace := store.traces[problem.problem_id])["ended"] != "not_finite"
            for cut in choose_cuts(problem.problem_id, trace["entropy"], rule, config.seed)
        ]
        store.check(cuts)
        done = sum(cut.key in store.cuts for cut in cuts)
        print(f"{len(cuts)} cuts, of which {done} are done", flush=True)
        _draw_suffixes(plan, model, store, grader, cuts)
        traces = [store.traces[problem.problem_id] for problem in problems]
        rows = [store.cuts[cut.key] for cut in cuts]
        summary = divergence_figure.summarise(traces, rows, config.cuts)
        store.finish(traces, rows, summary)
        try:
            drawing = divergence_figure.draw(rows, config.resamples)
            figures.save_figures(config.output_dir or "", figures.Drawn([drawing], []))
        except ValueError as reason:
            return summary | {"left_out": str(reason)}
        return summary | {"left_out": None}


def _check_flags(config: DivergenceConfig) -> Path:
    """Returns the data set's file."""
    if not config.data:
        where = get_task(config.task).where
        raise ValueError(f"--data is missing; expected the file of {config.task}. {where}.")
    if not config.output_dir:
        raise ValueError("--output_dir is missing; expected the study's folder")
    if config.task not in _TASKS:
        raise ValueError(f"--task={config.task}; expected one of {', '.join(_TASKS)}")
    if config.suffix_sampler not in _SUFFIX_SAMPLERS:
        raise ValueError(
            f"--suffix_sampler={config.suffix_sampler}; expected {' or '.join(_SUFFIX_SAMPLERS)}"
        )
    for name, least in _LEAST.items():
        if (value := getattr(config, name)) is not None and value < least:
            raise ValueError(f"--{name}={value}; expected at least {least}")
    if not 0 <= config.margin < 0.5:
        raise ValueError(f"--margin={config.margin}; expected at least 0 and less than 0.5")
    if not 0 < config.decile <= 0.5:
        raise ValueError(f"--decile={config.decile}; expected more than 0 and at most 0.5")
    return Path(config.data).expanduser()


def _make_plan(
    config: DivergenceConfig,
    model: LoadedModel,
    problems: tuple[Problem, ...],
    store: DivergenceStore,
) -> tuple[Plan, LoadedModel]:
    """Lays out the study: an arm for the traces, and one for the suffixes."""
    pad_id = model.eos_ids[0] if model.eos_ids else 0
    chat = model.chat_template is not None if config.chat is None else config.chat
    prompts = evaluation.encode_problems(config.task, problems, model, chat, pad_id)
    preset = get_task(config.task).preset
    trace_tokens = preset.max_new_tokens if config.max_new_tokens is None else config.max_new_tokens
    top_k = preset.top_k if config.top_k is None else config.top_k
    power = preset.power if config.power is None else config.power
    needed = int(prompts.lengths.max()) + trace_tokens + config.suffix_tokens
    if needed > model.config.longest_length:
        raise ValueError(
            f"--max_new_tokens={trace_tokens} and --suffix_tokens={config.suffix_tokens} after the "
            f"longest prompt may take {needed} positions; expected at most "
            f"{model.config.longest_length}, the context of {model.name}"
        )
    model = fit_length(model, needed)

    def make_arm(name: str, sampler: str, prompt_length: int, max_new_tokens: int) -> Arm:
        run = Config(
            prompt_length,
            max_new_tokens,
            num_stages=1,
            steps_per_stage=0,
            top_k=top_k or None,
            eos_ids=model.eos_ids,
            pad_id=pad_id,
        )
        return Arm(name, sampler, run, power, None, preset.cut_power, uniform_mix=0.0)

    slots = prompts.tokens.shape[1]
    trace = make_arm("trace", "low_temperature", slots, trace_tokens)
    # Prompts of suffixes are shorter than this; how long they are, the traces will tell.
    suffix = make_arm("suffix", config.suffix_sampler, slots + trace_tokens, config.suffix_tokens)
    chains_lib.check(model, prompts, trace.specialise()[1])
    num_slots = memory.parse_num_slots(config.num_slots)
    if num_slots is None and store.settings is not None:
        num_slots = store.settings.get("num_slots")  # as before: it moves the last bits
    most = len(problems) * len(KINDS) * config.cuts * config.resamples
    demands = evaluation.demands([trace], len(problems)) + evaluation.demands([suffix], most)
    plan = Plan(
        task=config.task,
        problems=problems,
        prompts=prompts,
        arms=(trace, suffix),
        seeds=tuple(range(config.resamples)),
        seed=config.seed,
        num_slots=memory.reserve(num_slots, model, demands).num_slots,
        record_problems=0,
        together=False,
    )
    return plan, model


def _draw_traces(plan: Plan, model: LoadedModel, store: DivergenceStore, grader: Grader) -> None:
    arm, problems = plan.arms[0], plan.problems
    cells = [
        Cell(0, place, 0)
        for place, problem in enumerate(problems)
        if problem.problem_id not in store.traces
    ]
    # Slots by the whole study: what is missing must not move the last bits.
    slots = min(plan.num_slots, len(problems))
    for finished in _run(plan, model, store, arm, plan.prompts, cells, slots):
        for index, chain in sorted(finished.items()):
            place = cells[index].problem
            problem, start = problems[place], int(plan.prompts.lengths[place])
            tokens = _completion(chain, start)
            text = model.tokenizer.decode(tokens)
            (grade,) = grader.grade_many(plan.task, [problem], [text])
            entropy = np.nan_to_num(chain.trace.entropy[start : start + len(tokens)])
            row = {
                "problem": problem.problem_id,
                "settings": store.hash_of(arm.name),
                "text": text,
                "tokens": tokens,
                "entropy": [round(float(nats), _DIGITS) for nats in entropy],
                "ended": _ending(chain, tokens, arm),
                "answer": grade.answer,
                "correct": grade.correct,
            }
            store.add_traces([row])


def _draw_suffixes(
    plan: Plan, model: LoadedModel, store: DivergenceStore, grader: Grader, cuts: Sequence[Cut]
) -> None:
    """Draws the suffixes of all cuts in one queue; each cut's prompt ends before the cut."""
    cells = [
        Cell(0, place, seed)
        for place, cut in enumerate(cuts)
        if cut.key not in store.cuts
        for seed in plan.seeds
    ]
    if not cells:
        return
    places = {problem.problem_id: place for place, problem in enumerate(plan.problems)}
    kept = [store.traces[cut.problem]["tokens"][: cut.cut - 1] for cut in cuts]
    starts = [
        plan.prompts.tokens[place, : plan.prompts.lengths[place]].tolist()
        for place in (places[cut.problem] for cut in cuts)
    ]
    arm = plan.arms[1]
    prompts = pad_prompts(
        [cut.problem for cut in cuts],
        [start + some for start, some in zip(starts, kept, strict=True)],
        arm.config.pad_id,
    )
    config = dataclasses.replace(arm.config, prompt_length=prompts.tokens.shape[1])
    arm = dataclasses.replace(arm, config=config)
    chains_lib.check(model, prompts, config)
    slots = min(plan.num_slots, len(cuts) * len(plan.seeds))
    suffixes: dict[int, dict[int, tuple[list[int], str]]] = collections.defaultdict(dict)
    for finished in _run(plan, model, store, arm, prompts, cells, slots):
        for index, chain in finished.items():
            cell = cells[index]
            tokens = _completion(chain, int(prompts.lengths[cell.problem]))
            suffixes[cell.problem][cell.seed] = tokens, _ending(chain, tokens, arm)
        for place in sorted(suffixes):
            if len(suffixes[place]) == len(plan.seeds):
                drawn = [suffixes[place][seed] for seed in plan.seeds]
                del suffixes[place]
                cut = cuts[place]
                problem = plan.problems[places[cut.problem]]
                texts = [model.tokenizer.decode(kept[place] + tokens) for tokens, _ in drawn]
                grades = grader.grade_many(plan.task, [problem] * len(drawn), texts)
                length = len(store.traces[cut.problem]["tokens"])
                row = describe_cut(plan.task, cut, length, drawn, grades)
                store.add_cuts([row | {"settings": store.hash_of(arm.name)}])


def describe_cut(
    task: str,
    cut: Cut,
    length: int,
    drawn: Sequence[tuple[list[int], str]],
    grades: Sequence[Grade],
) -> Row:
    """Returns a cut's row of ``cuts.jsonl``, all but its settings.

    Args:
      task: one of ``tasks.TASKS``.
      cut: the cut.
      length: tokens of the trace.
      drawn: of each suffix its tokens and how it ended, as in an evaluation's rows.
      grades: of each suffix, after the tokens that were kept.
    """
    suffixes = [tokens for tokens, _ in drawn]
    keys = [
        None if grade.answer is None else same_answer_key(task, grade.answer) for grade in grades
    ]
    return {
        **cut._asdict(),
        "length": length,
        "position": round(cut.cut / length, _DIGITS),
        "edit_distance": round(mean_edit_distance(suffixes), _DIGITS),
        "distinct_suffixes": len(set(map(tuple, suffixes))),
        "distinct_answers": len({*keys} - {None}),
        "mean_length": round(float(np.mean([len(tokens) for tokens in suffixes])), _DIGITS),
        "ended": sum(ending == "eos" for _, ending in drawn),
        "answered": sum(key is not None for key in keys),
        "correct": sum(grade.correct for grade in grades),
        "answers": [None if key is None else key[:_SHOWN] for key in keys],
    }


def _run(
    plan: Plan,
    model: LoadedModel,
    store: DivergenceStore,
    arm: Arm,
    prompts: EncodedPrompts,
    cells: Sequence[Cell],
    num_slots: int,
) -> Iterator[dict[int, Finished]]:
    """Yields chains as they finish, by their place among the cells; notes what they took."""
    if not cells:
        return
    # Equal chain numbers of traces and of suffixes must not draw alike.
    key = jax.random.split(jax.random.key(plan.seed))[int(arm.name == "suffix")]
    chains = arms_lib.lay_out([arm], prompts, cells)
    job = Job(arm.sampler, key, model, chains, arm.specialise()[1], num_slots)
    progress = jobs_lib.make_progress(job)
    decoded = rows = 0
    try:
        for finished in jobs_lib.run_job(job, progress):
            yield finished
            rows += len(finished)
            decoded += sum(int(chain.stats.decoded) for chain in finished.values())
    finally:
        with contextlib.suppress(OSError):  # the rows matter more
            store.add_session(
                {
                    "sampler": arm.name,
                    "seconds": round(progress.seconds, 3),
                    "compile_seconds": round(progress.compile_seconds, 3),
                    "forwards": progress.forwards,
                    "decoded_tokens": decoded,
                    "rows": rows,
                }
            )


def _completion(chain: Finished, start: int) -> list[int]:
    return chain.trace.tokens[start : int(chain.trace.length)].tolist()


def _ending(chain: Finished, tokens: Sequence[int], arm: Arm) -> str:
    if tokens and tokens[-1] in arm.config.eos_ids:
        return "eos"
    return "length" if chain.finite else "not_finite"


def main(config: DivergenceConfig) -> int:
    """Runs the launcher and prints its table; returns the exit status."""
    try:
        summary = run_suffix_divergence(config)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.")
        raise
    cuts = ", ".join(f"{number} at the {kind}" for kind, number in summary["cuts"].items())
    print(
        f"{summary['problems']} problems, {summary['paired_problems']} with cuts of both kinds; "
        f"{cuts}; {len(summary['fewer_cuts_than_wanted'])} traces with fewer cuts than wanted"
    )
    print(tables.to_text(divergence_figure.table(summary)), end="")
    print(f"no figure: {summary['left_out']}" if summary["left_out"] else config.output_dir)
    return 0


if __name__ == "__main__":
    start(DivergenceConfig, main)
