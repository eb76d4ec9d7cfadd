"""What ``experiments.evaluate`` and ``experiments.sweep`` share: their flags, and a whole run."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecmh_jax import Config
from ecmh_jax.sampling import SAMPLERS
from experiments import evaluation, memory, sampler_options
from experiments.arms import Arm
from experiments.evaluation import Plan
from experiments.evaluation_store import EvaluationStore
from experiments.grading.grader import Grader
from experiments.launch import setting
from experiments.tasks import TASKS, Preset, Problem, get_task, read_problems
from models.load import DTYPES, LoadedModel, fit_length, load_model
from models.quantisation import KINDS

# For a laptop: as the paper's in kind, and a tenth of the work.
_SMALL = {"max_new_tokens": 160, "num_stages": 8, "steps_per_stage": 5}
PRESETS = ("paper", "small")


@dataclasses.dataclass(frozen=True)
class EvaluationFlags:
    """Settings that do not differ between arms; each field is the flag of that name."""

    task: str = setting("gsm8k", "The data set.", tuple(TASKS))
    data: str | None = setting(None, "Its file, as published; see docs/evaluation.md. Required.")
    problems: str = setting("all", "Which of them, by their places in the file: 0-49,60 or all.")
    model: str = setting("smollm2-135m", "As in experiments.sample.")
    context_length: int | None = setting(None, "As in experiments.sample.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub id.")
    dtype: str | None = setting(None, "Default: float32 on CPU, bfloat16 elsewhere.", DTYPES)
    quantise: str | None = setting(None, "As in experiments.sample.", KINDS)
    chat: bool | None = setting(
        None,
        "Apply the model's chat template. Default: where the model has one. Base models are given "
        "raw text in the paper: --nochat where such a model carries a template.",
    )
    option: tuple[str, ...] = setting((), "As in experiments.sample.", repeated=True)
    seeds: str = setting("0-7", "Chains of each problem and arm: 0-7 or 0,2,5.")
    seed: int = setting(0, "Seed of the run, from which every chain draws.")
    preset: str = setting(
        "paper",
        "Where the settings come from that are not given: the task's in the paper, or small, for a "
        f"laptop: {', '.join(f'--{name}={value}' for name, value in _SMALL.items())}.",
        PRESETS,
    )
    top_k: int | None = setting(None, "Truncation of p itself; 0 for the whole vocabulary.")
    max_new_tokens: int | None = setting(None, "Longest completion.")
    num_stages: int | None = setting(None, "Stages; must divide max_new_tokens.")
    refine_finished: bool = setting(
        False, "Keep refining chains that have ended: what makes the final law p^power."
    )
    match: str = setting(
        "entropy_cut",
        "The arm whose decoded tokens best_of_n may spend, chain by chain, where it is run; none "
        "for as many candidates as --option says.",
    )
    num_slots: str = setting("auto", "As in experiments.sample.")
    record_problems: int = setting(
        0, "Keep every step of the first seed of so many problems, for the trace viewer."
    )
    grading_workers: int = setting(2, "Processes that grade answers.")
    grading_seconds: float = setting(5.0, "Time that grading one answer may take.")
    allow_unsandboxed_code: bool = setting(
        False, "HumanEval: run the model's programs without a sandbox where there is none."
    )
    output_dir: str | None = setting(None, "The evaluation's folder. Required.")


def resolve(config: EvaluationFlags, steps_per_stage: int | None) -> Preset:
    """Returns the settings of a run: the preset's, and those that were given.

    Args:
      config: the flags.
      steps_per_stage: as given, or None.
    """
    preset = get_task(config.task).preset
    if config.preset == "small":
        preset = preset._replace(**_SMALL)
    given = {
        "top_k": config.top_k,
        "max_new_tokens": config.max_new_tokens,
        "num_stages": config.num_stages,
        "steps_per_stage": steps_per_stage,
    }
    return preset._replace(**{name: value for name, value in given.items() if value is not None})


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Reads ``0-7,9``.

    Raises:
      ValueError: it is not such a list, or names a number twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--{flag}={text}; expected numbers and ranges, as in 0-7,9")
        top = int(last) if dash else int(first)
        if top < int(first) or top >= 1 << 24:
            raise ValueError(f"--{flag}={text}; expected ranges that rise, up to {(1 << 24) - 1}")
        numbers += range(int(first), top + 1)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"--{flag}={text}; expected each number once")
    return tuple(numbers)


def choose_problems(task: str, path: str, places: str, seed: int) -> tuple[Problem, ...]:
    """Reads the problems of a task that ``--problems`` names, in its order.

    Args:
      task: one of ``TASKS``.
      path: the file.
      places: numbers and ranges, or "all".
      seed: shuffles GPQA's choices.

    Raises:
      ValueError: the file is unusable, or has no problem in one of the places.
    """
    problems = read_problems(task, path, seed)
    if places == "all":
        return problems
    numbers = parse_numbers("problems", places)
    if max(numbers) >= len(problems):
        raise ValueError(
            f"--problems={places}; expected places in 0..{len(problems) - 1}, as {path} has "
            f"{len(problems)} problems"
        )
    return tuple(problems[number] for number in numbers)


def run_evaluation(
    config: EvaluationFlags,
    steps_per_stage: int | None,
    build_arms: Callable[[Config, Preset, dict[str, Any]], tuple[Arm, ...]],
    samplers: tuple[str, ...],
    together: bool,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Runs what the folder does not hold yet.

    Args:
      config: the flags.
      steps_per_stage: as given, or None for the preset's.
      build_arms: from a schedule, the settings and the samplers' options to the arms.
      samplers: those of the arms.
      together: whether arms that can share a program share the slots.
      report: receives a line now and then.

    Returns:
      {"added": rows, "rows": rows in all, "complete": whether all are there}.

    Raises:
      ValueError: a setting or a file is unusable; the message names it.
      OSError: the model cannot be had.
    """
    if not config.data:
        where = get_task(config.task).where
        raise ValueError(f"--data is missing; expected the file of {config.task}. {where}.")
    if not config.output_dir:
        raise ValueError("--output_dir is missing; expected the evaluation's folder")
    for sampler in samplers:
        if sampler not in SAMPLERS:
            raise ValueError(f"--samplers: {sampler!r}; expected some of {', '.join(SAMPLERS)}")
    if not samplers:
        raise ValueError(f"--samplers is empty; expected some of {', '.join(SAMPLERS)}")
    if len(set(samplers)) != len(samplers):
        raise ValueError(f"--samplers={','.join(samplers)}; expected each once")
    options = sampler_options.read_options(samplers, config.option)
    seeds = parse_numbers("seeds", config.seeds)
    num_slots = memory.parse_num_slots(config.num_slots)
    if config.record_problems < 0:
        raise ValueError(f"--record_problems={config.record_problems}; expected at least 0")
    problems = choose_problems(config.task, config.data, config.problems, config.seed)
    preset = resolve(config, steps_per_stage)
    with (
        Grader(
            config.grading_workers, config.grading_seconds, config.allow_unsandboxed_code
        ) as grader,
        EvaluationStore(config.output_dir) as store,
    ):
        grader.check(config.task)
        model = load_model(config.model, config.dtype, config.revision, quantise=config.quantise)
        plan, model = _make_plan(
            config, model, problems, seeds, preset, options, build_arms, num_slots, store, together
        )
        evaluation.check(plan, model)
        store.adopt(evaluation.describe_settings(plan, model, _describe_data(config)))
        wanted = list(plan.wanted())
        missing = sum(key not in store.rows for key in wanted)
        report(f"{len(wanted)} chains, of which {len(wanted) - missing} are done")
        try:
            added = evaluation.run(plan, model, store, grader)
        except KeyboardInterrupt:
            report("Interrupted. The same command goes on from here.")
            raise
        done = sum(key in store.rows for key in wanted)
        return {"added": added, "rows": len(store.rows), "complete": done == len(wanted)}


def _make_plan(
    config: EvaluationFlags,
    model: LoadedModel,
    problems: tuple[Problem, ...],
    seeds: tuple[int, ...],
    preset: Preset,
    options: dict[str, Any],
    build_arms: Callable[[Config, Preset, dict[str, Any]], tuple[Arm, ...]],
    num_slots: int | None,
    store: EvaluationStore,
    together: bool,
) -> tuple[Plan, LoadedModel]:
    pad_id = model.eos_ids[0] if model.eos_ids else 0
    chat = model.chat_template is not None if config.chat is None else config.chat
    prompts = evaluation.encode_problems(config.task, problems, model, chat, pad_id)
    model = fit_length(
        model,
        config.context_length or int(prompts.lengths.max()) + preset.max_new_tokens,
    )
    run = Config(
        prompt_length=prompts.tokens.shape[1],
        max_new_tokens=preset.max_new_tokens,
        num_stages=preset.num_stages,
        steps_per_stage=preset.steps_per_stage,
        top_k=preset.top_k or None,
        eos_ids=model.eos_ids,
        pad_id=pad_id,
        refine_finished=config.refine_finished,
    )
    arms = build_arms(run, preset, options)
    if num_slots is None and store.settings is not None:
        num_slots = store.settings.get("num_slots")  # as before: it moves the last bits
    # Rows of a later run may be few; the number of slots must not depend on that.
    demands = evaluation.demands(arms, len(problems) * len(seeds))
    reservation = memory.reserve(num_slots, model, demands)
    plan = Plan(
        task=config.task,
        problems=problems,
        prompts=prompts,
        arms=arms,
        seeds=seeds,
        seed=config.seed,
        num_slots=reservation.num_slots,
        record_problems=config.record_problems,
        together=together,
    )
    return plan, model


def _describe_data(config: EvaluationFlags) -> dict[str, Any]:
    path = Path(config.data or "").expanduser()
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
