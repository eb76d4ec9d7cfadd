"""The usual way to sample p^alpha: a library's ``generate``, one prompt at a time.

What a script does that has no cache of its own: every proposal is a call of transformers'
``generate`` on the kept prefix, which is prefilled again each time. Timed on a share of a run's
own Metropolis-Hastings steps and scaled by their number.
"""

import time
from typing import Any

import numpy as np

from ecmh_jax.base import Config
from ecmh_jax.chain_queue import Chains


def time_usual_way(
    reference: Any,
    chains: Chains,
    run: Config,
    tokens: np.ndarray,
    attempted: np.ndarray,
    cut: np.ndarray,
    num_steps: int,
    seed: int,
) -> dict[str, float]:
    """Times proposals with the prefix and suffix lengths of a run's own steps.

    A proposal is drawn to end-of-sequence or the stage's horizon, and its log-probabilities come
    from the scores that ``generate`` returns. Extensions, the computation of the ratio and the
    entropies are left out, in favour of the usual way.

    Args:
      reference: the same model in transformers.
      chains: the chains of the run, [N].
      run: its configuration.
      tokens: [N, T] the chains' final traces, whose prefixes stand for those of the step.
      attempted: [N, num_stages, steps_per_stage] bool.
      cut: [N, num_stages, steps_per_stage] int32, cuts counted from 1.
      num_steps: proposals to time.
      seed: which steps.

    Returns:
      Seconds a proposal (mean, standard error), proposals timed, and steps of the whole run.
    """
    import torch

    steps = np.argwhere(attempted)
    chosen = np.random.default_rng(seed).permutation(len(steps))[:num_steps]
    power = np.asarray(chains.tuning.power)
    seconds = []
    for index in [int(chosen[0]), *chosen.tolist()]:  # the first one warms up and is thrown away
        chain, stage, step = steps[index]
        kept = int(chains.prompt_lengths[chain]) + int(cut[chain, stage, step]) - 1
        horizon = int(chains.prompt_lengths[chain]) + (int(stage) + 1) * run.stage_length
        prefix = torch.tensor(tokens[chain : chain + 1, :kept].astype(np.int64))
        started = time.perf_counter()
        with torch.inference_mode():
            reference.generate(
                prefix,
                attention_mask=torch.ones_like(prefix),
                max_new_tokens=horizon - kept,
                do_sample=True,
                temperature=1.0 / float(power[chain]),
                top_k=run.top_k or 0,
                eos_token_id=list(run.eos_ids) or None,
                pad_token_id=run.pad_id,
                return_dict_in_generate=True,
                output_scores=True,
            )
        seconds.append(time.perf_counter() - started)
    timed = np.asarray(seconds[1:])
    return {
        "seconds_per_proposal": float(timed.mean()),
        "standard_error": float(timed.std(ddof=1) / np.sqrt(len(timed))),
        "proposals_timed": len(timed),
        "proposals_of_the_run": len(steps),
        "seconds_of_the_run": float(timed.mean()) * len(steps),
    }
