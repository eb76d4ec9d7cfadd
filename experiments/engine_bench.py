"""The engine against lockstep, each idea alone and all together, in one process on one model."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import chain_queue, compiled, make_tuning, sampling
from ecmh_jax.base import Config, Info, Stats
from ecmh_jax.chain_queue import Chains
from experiments import chains as chains_lib
from experiments import engine_parts, usual_way
from experiments import prompts as prompts_lib
from experiments.decode_bench import load_reference
from models.load import LoadedModel, fit_length


class _Form(NamedTuple):
    """A way to run the same chains: on the engine or in lockstep, and the ideas that are on."""

    engine: bool
    replay: bool
    early_rejection: bool
    work_ahead: bool


# Eight problems of a few steps each, as a small instruction-tuned model can try them.
PROMPTS = (
    *prompts_lib.DEMONSTRATION,
    "A farmer has 17 sheep and buys 8 more. Then 5 run away. How many sheep are left?",
    "A book costs 12 dollars and a pen costs a third of that. What do two books and a pen cost?",
    "Tom reads 15 pages a day. How many days does he need for a book of 240 pages?",
    "A rectangle is 9 cm long and 4 cm wide. What are its area and its perimeter?",
    "A shop sells apples at 3 for 2 dollars. How much do 18 apples cost?",
)
# Every form samples the same traces. "free_running" alone is the engine without the other ideas.
FORMS = {
    "lockstep": _Form(engine=False, replay=False, early_rejection=False, work_ahead=False),
    "free_running": _Form(engine=True, replay=False, early_rejection=False, work_ahead=False),
    "replay": _Form(engine=False, replay=True, early_rejection=False, work_ahead=False),
    "early_rejection": _Form(engine=False, replay=False, early_rejection=True, work_ahead=False),
    "without_work_ahead": _Form(engine=True, replay=True, early_rejection=True, work_ahead=False),
    "engine": _Form(engine=True, replay=True, early_rejection=True, work_ahead=True),
}


@dataclasses.dataclass(frozen=True)
class EngineBenchConfig:
    """What to run.

    Attributes:
      forms: some of ``FORMS``; ratios are to "lockstep" where it is among them.
      sampler: entropy_cut or uniform_cut.
      power: alpha.
      top_k: truncation of the token law.
      num_chains: chains of each prompt.
      num_slots: chains that decode together.
      num_stages: stages of the schedule.
      stage_length: tokens of a stage.
      steps_per_stage: Metropolis-Hastings steps of a stage.
      steps_per_tick: decode steps of an engine's call.
      usual_proposals: proposals timed in the usual way; 0 for none.
      parts: whether to time the parts of a decode step and to read its memory.
      repeats: timings of each part.
      seed: of the run.
    """

    forms: tuple[str, ...]
    sampler: str
    power: float
    top_k: int | None
    num_chains: int
    num_slots: int
    num_stages: int
    stage_length: int
    steps_per_stage: int
    steps_per_tick: int
    usual_proposals: int
    parts: bool
    repeats: int
    seed: int


class FormRun(NamedTuple):
    """What a form did; chains [N] in the order of ``Chains``.

    Attributes:
      tokens: [N, T].
      log_prob: [N] of whole completions.
      info: [N, num_stages, steps_per_stage].
      stats: [N].
      forwards: decode steps of the whole batch.
      drawn: tokens drawn in them, those included that were drawn ahead and thrown away.
      drained_forwards: decode steps once no chain waits and a slot has lost its own.
      drained_drawn: tokens drawn in those.
      seconds: wall time without compiling.
      compile_seconds: what compiling took.
    """

    tokens: np.ndarray
    log_prob: np.ndarray
    info: Info
    stats: Stats
    forwards: int
    drawn: int
    drained_forwards: int
    drained_drawn: int
    seconds: float
    compile_seconds: float


def encode(
    prompts_file: str | None, model: LoadedModel, num_prompts: int
) -> prompts_lib.EncodedPrompts:
    """Encodes the first ``num_prompts`` prompts of a file, or of the benchmark's own."""
    texts = (prompts_lib.read_prompts(prompts_file) if prompts_file else PROMPTS)[:num_prompts]
    pad_id = model.eos_ids[0] if model.eos_ids else 0
    return prompts_lib.encode_prompts(texts, model, None, pad_id)


def run_engine_bench(
    model: LoadedModel,
    config: EngineBenchConfig,
    prompts: prompts_lib.EncodedPrompts,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Runs the forms, times the parts of a step and the usual way.

    Args:
      model: the model.
      config: what to run.
      prompts: their tokens.
      report: receives a line of progress at a time.

    Returns:
      The figures: "forms" is a row a form, and "parts", "memory" and "usual_way" where asked for.

    Raises:
      ValueError: prompt and completion do not fit into the model's context.
    """
    chains, run = build_chains(prompts, config, model)
    if run.num_slots > model.config.longest_length:
        raise ValueError(
            f"--num_stages={config.num_stages} --stage_length={config.stage_length} and prompts of "
            f"{run.prompt_length} slots make {run.num_slots}; expected at most "
            f"{model.config.longest_length}, the context of {model.name}"
        )
    model = fit_length(model, int(prompts.lengths.max()) + run.max_new_tokens)
    rows, runs = _run_forms(model, chains, run, config, report)
    figures: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "prompts": len(prompts.texts),
        "chains": len(chains.prompts),
        "cache_slots": run.num_slots,
        "forms": rows,
    }
    if config.parts:
        figures["parts"] = engine_parts.time_parts(
            model, chains, run, config.num_slots, config.repeats
        )
        figures["memory"] = engine_parts.memory_of_tick(
            model, run, config.num_slots, config.steps_per_tick
        )
        report(engine_parts.describe(figures["parts"], figures["memory"], config.num_slots))
    reference = load_reference(model) if config.usual_proposals else None
    if reference is not None:
        last = runs[config.forms[-1]]
        usual = usual_way.time_usual_way(
            reference,
            chains,
            run,
            last.tokens,
            np.asarray(last.info.attempted),
            np.asarray(last.info.cut),
            config.usual_proposals,
            config.seed,
        )
        usual["ratio_to_usual_way"] = usual["seconds_of_the_run"] / last.seconds
        figures["usual_way"] = usual
        report(
            f"the usual way: {usual['seconds_per_proposal']:.2f} s a proposal "
            f"(+- {usual['standard_error']:.2f}, {usual['proposals_timed']} timed), "
            f"{usual['seconds_of_the_run']:.0f} s for {usual['proposals_of_the_run']} of them; "
            f"{usual['ratio_to_usual_way']:.1f} x {config.forms[-1]}"
        )
    return figures


def build_chains(
    prompts: prompts_lib.EncodedPrompts, config: EngineBenchConfig, model: LoadedModel
) -> tuple[Chains, Config]:
    """Lays the chains out and configures their run."""
    run = Config(
        prompt_length=prompts.tokens.shape[1],
        max_new_tokens=config.num_stages * config.stage_length,
        num_stages=config.num_stages,
        steps_per_stage=config.steps_per_stage,
        top_k=config.top_k,
        eos_ids=model.eos_ids,
        pad_id=model.eos_ids[0] if model.eos_ids else 0,
    )
    tuning = make_tuning(len(prompts.lengths) * config.num_chains, power=config.power)
    tuning, run = sampling.specialise(config.sampler, tuning, run)
    return chains_lib.lay_out(prompts, config.num_chains, tuning), run


def _run_forms(
    model: LoadedModel,
    chains: Chains,
    run: Config,
    config: EngineBenchConfig,
    report: Callable[[str], None],
) -> tuple[list[dict[str, Any]], dict[str, FormRun]]:
    """Runs every form on the same chains; returns a row of figures a form, and the runs."""
    rows, runs = [], {}
    for name in config.forms:
        form = FORMS[name]
        form_config = dataclasses.replace(
            run,
            replay=form.replay,
            early_rejection=form.early_rejection,
            work_ahead=form.work_ahead,
        )
        runner = _run_engine if form.engine else _run_lockstep
        runs[name] = runner(model, chains, form_config, config)
        rows.append(_describe(name, runs, config))
        report(describe_row(rows[-1]))
    return rows, runs


def describe_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    text = (
        f"{row['form']:>15}: {row['seconds']:7.1f} s, {row['forwards']:6d} forwards, "
        f"{row['utilisation']:4.0%} of slots used, decoded {row['decoded']}, "
        f"discarded {row['discarded']}, replayed {row['replayed']}, saved {row['saved']}, "
        f"accepted {row['acceptance']:.0%}"
    )
    if "ratio_to_lockstep" in row:
        text += (
            f"; {row['ratio_to_lockstep']:.2f} x lockstep in seconds, "
            f"{row['forwards_ratio_to_lockstep']:.2f} x in forwards, "
            f"{row['equal_traces']} of {row['chains']} traces equal"
        )
    return text


def _describe(name: str, runs: dict[str, FormRun], config: EngineBenchConfig) -> dict[str, Any]:
    run, stats = runs[name], jax.tree.map(lambda counter: int(counter.sum()), runs[name].stats)
    slot_steps = run.forwards * config.num_slots
    row = {
        "form": name,
        "chains": len(run.tokens),
        "seconds": run.seconds,
        "compile_seconds": run.compile_seconds,
        "forwards": run.forwards,
        "milliseconds_per_forward": 1e3 * run.seconds / run.forwards,
        "utilisation": run.drawn / slot_steps,
        "utilisation_until_drained": (run.drawn - run.drained_drawn)
        / max(slot_steps - run.drained_forwards * config.num_slots, 1),
        "drained_forwards": run.drained_forwards,
        "discarded": run.drawn - stats.decoded,
        "proposed": stats.decoded + stats.replayed + stats.saved,
        "replayed": stats.replayed,
        "saved": stats.saved,
        "decoded": stats.decoded,
        "decoded_per_chain_mean": float(run.stats.decoded.mean()),
        "decoded_per_chain_max": int(run.stats.decoded.max()),
        "tokens_per_second": stats.decoded / run.seconds,
        "attempted": stats.attempted,
        "null_moves": stats.null_moves,
        "acceptance": stats.accepted / max(stats.attempted, 1),
    }
    if "lockstep" in runs:
        lockstep = runs["lockstep"]
        # What a scheduler without any idle slot would reach with this form's own tokens.
        ideal = lockstep.forwards * config.num_slots / stats.decoded
        row |= {
            "ratio_to_lockstep": lockstep.seconds / run.seconds,
            "forwards_ratio_to_lockstep": lockstep.forwards / run.forwards,
            "ideal_ratio_to_lockstep": ideal,
            "share_of_ideal": lockstep.forwards / run.forwards / ideal,
            "equal_traces": int((run.tokens == lockstep.tokens).all(axis=1).sum()),
            "largest_log_prob_difference": float(np.abs(run.log_prob - lockstep.log_prob).max()),
        }
    return row


def _run_engine(
    model: LoadedModel, chains: Chains, run: Config, config: EngineBenchConfig
) -> FormRun:
    key = jax.random.key(config.seed)
    compile_seconds = chains_lib.compile_programs(
        key, model, run, config.num_slots, config.steps_per_tick
    )
    finished: dict[int, Any] = {}
    forwards = drawn = drained_forwards = drained_drawn = 0
    started = time.perf_counter()
    for update in chain_queue.run_queue(
        key,
        model.language_model,
        model.params,
        chains,
        run,
        config.num_slots,
        config.steps_per_tick,
    ):
        finished |= update.finished
        forwards += config.steps_per_tick
        drawn += int(update.status.drawn)
        if not update.waiting and not (update.status.busy & (update.chains >= 0)).all():
            drained_forwards += config.steps_per_tick
            drained_drawn += int(update.status.drawn)
    seconds = time.perf_counter() - started
    result = jax.tree.map(
        np.asarray, sampling.assemble([finished[index] for index in range(len(chains.prompts))])
    )
    return FormRun(
        tokens=result.trace.tokens,
        log_prob=result.trace.log_prob.sum(axis=1),
        info=jax.tree.map(lambda record: np.moveaxis(record, -1, 0), result.info),
        stats=result.stats,
        forwards=forwards,
        drawn=drawn,
        drained_forwards=drained_forwards,
        drained_drawn=drained_drawn,
        seconds=seconds,
        compile_seconds=compile_seconds,
    )


def _run_lockstep(
    model: LoadedModel, chains: Chains, run: Config, config: EngineBenchConfig
) -> FormRun:
    """Batches of ``num_slots`` chains, one after the other; the last one may be padded."""
    num_chains = len(chains.prompts)
    static = {"model": model.language_model, "config": run}
    key = jax.random.key(config.seed)
    compile_seconds = None
    forwards, seconds, parts = 0, 0.0, []
    for begin in range(0, num_chains, config.num_slots):
        rows = np.arange(begin, begin + config.num_slots) % num_chains
        real = min(config.num_slots, num_chains - begin)
        tuning = jax.tree.map(lambda field, rows=rows: jnp.asarray(field)[rows], chains.tuning)

        def start(rows=rows):
            fields = (jnp.asarray(field[rows]) for field in chains[:4])
            return compiled.init(model.language_model, model.params, *fields, run)

        if compile_seconds is None:
            started = time.perf_counter()
            arguments = (key, jax.eval_shape(start), model.params, tuning)
            compiled.extend.lower(*arguments, **static).compile()
            compiled.kernel.lower(*arguments, **static).compile()
            jax.block_until_ready(start())
            compile_seconds = time.perf_counter() - started
        started = time.perf_counter()
        state = start()
        frozen = np.arange(config.num_slots) >= real
        state = state._replace(frozen=jnp.asarray(frozen))
        infos, decoded = [], np.zeros(config.num_slots, np.int64)
        for _ in range(run.num_stages):
            for step in range(run.steps_per_stage + 1):
                if step == 0:
                    state = compiled.extend(key, state, model.params, tuning, **static)
                else:
                    state, info = compiled.kernel(key, state, model.params, tuning, **static)
                    infos.append(jax.tree.map(np.asarray, info))
                total = np.asarray(state.stats.decoded)
                forwards += int((total - decoded).max())  # the batch waits for its longest suffix
                decoded = total
        seconds += time.perf_counter() - started
        shape = (run.num_stages, run.steps_per_stage, config.num_slots)
        info = jax.tree.map(lambda *leaves, s=shape: np.stack(leaves).reshape(s), *infos)
        parts.append(
            (
                np.asarray(state.trace.tokens)[:real],
                np.asarray(state.trace.log_prob).sum(axis=1)[:real],
                jax.tree.map(lambda field, real=real: np.moveaxis(field, -1, 0)[:real], info),
                jax.tree.map(lambda field, real=real: np.asarray(field)[:real], state.stats),
            )
        )
    tokens, log_prob, info, stats = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return FormRun(
        tokens=tokens,
        log_prob=log_prob,
        info=info,
        stats=stats,
        forwards=forwards,
        drawn=int(stats.decoded.sum()),
        drained_forwards=0,
        drained_drawn=0,
        seconds=seconds,
        compile_seconds=compile_seconds or 0.0,
    )
