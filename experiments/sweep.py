"""``python -m experiments.sweep``: one sampler over a grid of settings.

Power, cut power, proposal temperature and uniform mix are numbers of each chain, so all their
combinations run in the same slots of one compiled program; each number of steps has its own.
"""

import dataclasses
import itertools
from typing import Any

from ecmh_jax import Config, sampling
from experiments.arms import Arm
from experiments.evaluation_flags import EvaluationFlags, run_evaluation
from experiments.launch import setting, start
from experiments.tasks import Preset


@dataclasses.dataclass(frozen=True)
class SweepConfig(EvaluationFlags):
    """One run of the launcher; each field is the flag of that name."""

    sampler: str = setting("entropy_cut", "The sampler.", sampling.SAMPLERS)
    power: tuple[str, ...] = setting((), "Values of alpha, separated by commas.")
    proposal_temperature: tuple[str, ...] = setting((), "Values of tau. Default: 1 / power.")
    cut_power: tuple[str, ...] = setting((), "Values of beta.")
    uniform_mix: tuple[str, ...] = setting((), "Values of the share of uniform cuts.")
    steps_per_stage: tuple[str, ...] = setting((), "Numbers of steps.")


def grid(config: SweepConfig) -> list[dict[str, float]]:
    """Returns every combination of the values that were given.

    Raises:
      ValueError: a value is no number, or is given twice.
    """
    axes = []
    for name in ("power", "proposal_temperature", "cut_power", "uniform_mix", "steps_per_stage"):
        kind = int if name == "steps_per_stage" else float
        texts = getattr(config, name)
        try:
            values = [kind(text) for text in texts]
        except ValueError as error:
            raise ValueError(f"--{name}={','.join(texts)}; expected numbers") from error
        if len(set(values)) != len(values):
            raise ValueError(f"--{name}={','.join(texts)}; expected each value once")
        axes.append([(name, value) for value in values] or [None])
    return [dict(axis for axis in point if axis) for point in itertools.product(*axes)]


def name_of(sampler: str, point: dict[str, float]) -> str:
    """What the rows of a point are called: entropy_cut[power=2,cut_power=4]."""
    values = ",".join(f"{name}={value:g}" for name, value in point.items())
    return f"{sampler}[{values}]" if values else sampler


def run_sweep(config: SweepConfig) -> dict[str, Any]:
    """Runs the sweep; see ``evaluation_flags.run_evaluation``."""
    points = grid(config)

    def build_arms(run: Config, preset: Preset, options: dict[str, Any]) -> tuple[Arm, ...]:
        return tuple(
            Arm(
                name=name_of(config.sampler, point),
                sampler=config.sampler,
                config=dataclasses.replace(
                    run, steps_per_stage=int(point.get("steps_per_stage", run.steps_per_stage))
                ),
                power=point.get("power", preset.power),
                proposal_temperature=point.get("proposal_temperature"),
                cut_power=point.get("cut_power", preset.cut_power),
                uniform_mix=point.get("uniform_mix", 0.0),
                options=options[config.sampler],
            )
            for point in points
        )

    return run_evaluation(
        config, None, build_arms, (config.sampler,), together=True, report=_report
    )


def _report(line: str) -> None:
    print(line, flush=True)


def main(config: SweepConfig) -> int:
    """Runs the launcher; returns the exit status."""
    result = run_sweep(config)
    print(f"{result['added']} rows added, {result['rows']} in {config.output_dir}")
    print(f"python -m experiments.report {config.output_dir}")
    return 0 if result["complete"] else 1


if __name__ == "__main__":
    start(SweepConfig, main)
