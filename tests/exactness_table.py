"""Prints how far the exact kernels and their faulty variants end up from p^power.

    python -m tests.exactness_table

Every number is computed from transition matrices, nothing is sampled, and averaged over random toy
models: first the law after n steps of a single stage that starts from a low-temperature rollout,
then the law of the stagewise schedule.
"""

from __future__ import annotations

import numpy as np

from tests.oracle import extension_law, final_law, state_space, target, total_variation
from tests.oracle_mutants import MUTANTS, embed, mutant_transition_matrix, off_stage
from tests.toy_models import ToyModel, random_toy_model

NUM_MODELS = 10
VOCABULARY_SIZE = 3
HORIZON = 5
POWER = 4.0
STEPS = (1, 10, 100)
EOS_BOOSTS = {"EOS-heavy": -0.5, "low-EOS": -3.0}


def table_models(eos_boost: float, top_k: int | None = None) -> list[ToyModel]:
    """Draws the table's models, the same ones in every call."""
    return [
        random_toy_model(
            np.random.default_rng(seed), VOCABULARY_SIZE, HORIZON, eos_boost, eos_rank=top_k
        )
        for seed in range(NUM_MODELS)
    ]


def measure(
    models: list[ToyModel],
    sampler: str,
    mutant: str | None,
    top_k: int | None = None,
    proposal_temperature: float = 1.0 / POWER,
) -> np.ndarray:
    """Averages one kernel's figures over models.

    Args:
      models: toy models with horizon `HORIZON`.
      sampler: "entropy_cut" or "uniform_cut".
      mutant: a name from `MUTANTS`, None for the exact kernel.
      top_k: truncation.
      proposal_temperature: of the rollout and of every proposal.

    Returns:
      [len(STEPS) + 2]: the total-variation distance after each of `STEPS` steps, then, after the
      last of them, the mass outside of the stage's states and that of traces ending in EOS.
    """
    figures = np.zeros((len(models), len(STEPS) + 2))
    for row, model in enumerate(models):
        stage = state_space(model, HORIZON, top_k)
        space, step = mutant_transition_matrix(
            model,
            HORIZON,
            mutant,
            POWER,
            proposal_temperature=proposal_temperature,
            top_k=top_k,
            sampler=sampler,
        )
        goal = embed(target(model, HORIZON, POWER, top_k), stage, space)
        rollout = extension_law(model, (), HORIZON, proposal_temperature, top_k)
        law = embed(rollout, stage, space)
        done = 0
        for column, num_steps in enumerate(STEPS):
            law = law @ np.linalg.matrix_power(step, num_steps - done)
            done = num_steps
            figures[row, column] = total_variation(law, goal)
        figures[row, -2] = law[off_stage(space, HORIZON)].sum()
        figures[row, -1] = law[space.finished].sum()
    return figures.mean(axis=0)


def target_eos(models: list[ToyModel], top_k: int | None = None) -> float:
    """Averages the target's probability of ending in EOS over models."""
    masses = []
    for model in models:
        finished = state_space(model, HORIZON, top_k).finished
        masses.append(target(model, HORIZON, POWER, top_k)[finished].sum())
    return float(np.mean(masses))


def kernel_table(
    kind: str,
    kernels: list[tuple[str, str | None]],
    top_k: int | None = None,
    proposal_temperature: float = 1.0 / POWER,
) -> list[str]:
    """Renders one stage's table as lines of Markdown: a row for each `(sampler, mutant)`."""
    models = table_models(EOS_BOOSTS[kind], top_k)
    law = "" if top_k is None else f", top_k {top_k}"
    columns = [f"TV, n = {steps}" for steps in STEPS]
    columns += [f"off support, n = {STEPS[-1]}", f"P(EOS), n = {STEPS[-1]}"]
    lines = [
        f"**One stage, {kind} models{law}, proposal temperature {proposal_temperature:g}**; "
        f"target P(EOS) = {target_eos(models, top_k):.3f}",
        "",
        "| kernel | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for sampler, mutant in kernels:
        figures = measure(models, sampler, mutant, top_k, proposal_temperature)
        name = f"{sampler}, {'**exact**' if mutant is None else mutant}"
        lines.append(f"| {name} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")
    return [*lines, ""]


def schedule_table(kind: str) -> list[str]:
    """Renders the schedule of `HORIZON` stages of one token each as lines of Markdown."""
    models = table_models(EOS_BOOSTS[kind])
    goals = [target(model, HORIZON, POWER) for model in models]
    columns = [f"TV, {steps} steps a stage" for steps in (0, *STEPS)]
    lines = [
        f"**{HORIZON} stages of 1 token, {kind} models, exact kernels**",
        "",
        "| sampler, finished chains | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for sampler in ("entropy_cut", "uniform_cut"):
        for refine_finished in (True, False):
            cells = []
            for steps in (0, *STEPS):
                finals = [
                    final_law(
                        model,
                        HORIZON,
                        1,
                        steps,
                        POWER,
                        sampler=sampler,
                        refine_finished=refine_finished,
                    )
                    for model in models
                ]
                distances = map(total_variation, finals, goals)
                cells.append(f"{np.mean(list(distances)):.3f}")
            name = f"{sampler}, {'refined' if refine_finished else 'frozen'}"
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def exactness_table() -> str:
    """Renders the whole comparison as Markdown."""
    exact: list[tuple[str, str | None]] = [("entropy_cut", None), ("uniform_cut", None)]
    whole = [name for name in MUTANTS if name != "untruncated_q"]  # The same thing without top_k.
    faulty = [("entropy_cut", name) for name in whole]
    faulty += [("uniform_cut", "no_cut_term"), ("uniform_cut", "published")]
    lines = []
    for kind in EOS_BOOSTS:
        lines += kernel_table(kind, [*exact, *faulty])
    # At temperature 1 / power hardly any mass of q is truncated, so that fault would not show.
    truncated = [*exact, ("entropy_cut", "untruncated_q"), ("uniform_cut", "untruncated_q")]
    lines += kernel_table("low-EOS", truncated, top_k=2, proposal_temperature=1.0)
    for kind in EOS_BOOSTS:
        lines += schedule_table(kind)
    return "\n".join(lines)


if __name__ == "__main__":
    print(exactness_table())
