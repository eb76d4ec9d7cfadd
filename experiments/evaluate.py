"""``python -m experiments.evaluate``: samplers on a task, graded, with what they cost.

Rows are kept as chains finish; the same command does what is missing. Look at the folder with
``python -m experiments.report``.
"""

import dataclasses
from typing import Any

from ecmh_jax import Config, sampling
from experiments.arms import Arm
from experiments.evaluation_flags import EvaluationFlags, run_evaluation
from experiments.launch import setting, start
from experiments.tasks import Preset


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(EvaluationFlags):
    """One run of the launcher; each field is the flag of that name."""

    samplers: tuple[str, ...] = setting(
        ("standard", "low_temperature", "uniform_cut", "entropy_cut"),
        f"Separated by commas, of {', '.join(sampling.SAMPLERS)}.",
    )
    power: float | None = setting(None, "alpha of the target p^alpha.")
    proposal_temperature: float | None = setting(None, "tau of the proposal. Default: 1 / power.")
    cut_power: float | None = setting(None, "beta: cuts fall where entropy jumps up.")
    uniform_mix: float = setting(0.0, "Share of uniform cuts, 0 to 1.")
    steps_per_stage: int | None = setting(None, "Metropolis-Hastings steps a stage.")


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Runs the evaluation; see ``evaluation_flags.run_evaluation``."""

    def build_arms(run: Config, preset: Preset, options: dict[str, Any]) -> tuple[Arm, ...]:
        matched = config.match if config.match in config.samplers else None
        return tuple(
            Arm(
                name=sampler,
                sampler=sampler,
                config=run,
                power=preset.power if config.power is None else config.power,
                proposal_temperature=config.proposal_temperature,
                cut_power=preset.cut_power if config.cut_power is None else config.cut_power,
                uniform_mix=config.uniform_mix,
                options=options[sampler],
                match=matched if sampler == "best_of_n" else None,
            )
            # What others are matched to comes before them.
            for sampler in sorted(config.samplers, key=lambda name: name == "best_of_n")
        )

    return run_evaluation(
        config, config.steps_per_stage, build_arms, config.samplers, together=False, report=_report
    )


def _report(line: str) -> None:
    print(line, flush=True)


def main(config: EvaluateConfig) -> int:
    """Runs the launcher; returns the exit status."""
    result = run_evaluate(config)
    print(f"{result['added']} rows added, {result['rows']} in {config.output_dir}")
    print(f"python -m experiments.report {config.output_dir}")
    return 0 if result["complete"] else 1


if __name__ == "__main__":
    start(EvaluateConfig, main)
