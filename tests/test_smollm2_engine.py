"""The engine on the real model: token for token what lockstep samples. Slow."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import ecmh_jax
from ecmh_jax import compiled

pytestmark = pytest.mark.slow

NUM_CHAINS = 6
CONFIG = ecmh_jax.Config(12, 16, num_stages=2, steps_per_stage=3, eos_ids=(2,), pad_id=2)
# power, 1 / tau, share of uniform cuts; the last two lie outside of certain rejection's range.
TUNING = ecmh_jax.make_tuning(
    NUM_CHAINS,
    power=[4.0, 4.0, 2.0, 1.0, 2.0, 1.0],
    proposal_temperature=1 / np.array([4.0, 4.0, 2.0, 1.0, 3.0, 0.5]),
    uniform_mix=[0.0, 1.0, 0.0, 0.0, 0.1, 1.0],
)


@pytest.fixture(scope="module")
def chains(smollm2):
    """Prompts [6, 12] and lengths [6] of two texts, and who the chains are."""
    encoded = [smollm2.tokenizer.encode(text) for text in ("The capital of France is", "2 + 2 =")]
    prompts = np.zeros((NUM_CHAINS, CONFIG.prompt_length), np.int32)
    for row, ids in zip(prompts, itertools.cycle(encoded), strict=False):
        row[: len(ids)] = ids
    lengths = np.resize([len(ids) for ids in encoded], NUM_CHAINS).astype(np.int32)
    identity = np.arange(NUM_CHAINS, dtype=np.int32)
    return prompts, lengths, identity % 2, identity // 2


@pytest.fixture(scope="module")
def plain(smollm2, chains):
    """Lockstep, every proposal decoded from its cut to its end; by ``refine_finished``."""
    return {
        refine: jax.tree.map(
            np.asarray,
            compiled.run(
                jax.random.key(3),
                smollm2.params,
                *chains,
                TUNING,
                model=smollm2.language_model,
                config=dataclasses.replace(
                    CONFIG, refine_finished=refine, replay=False, early_rejection=False
                ),
            ),
        )
        for refine in (False, True)
    }


@pytest.mark.parametrize(
    ("replay", "early_rejection", "refine_finished", "steps_per_tick"),
    [
        (True, True, False, 4),
        (True, True, True, 1),
        (True, False, False, 16),
        (False, True, True, 4),
        (False, False, False, 4),
    ],
)
def test_engine_is_the_lockstep_form(
    smollm2, chains, plain, replay, early_rejection, refine_finished, steps_per_tick
):
    prompts, lengths, prompt_ids, chain_ids = chains
    config = dataclasses.replace(
        CONFIG, refine_finished=refine_finished, replay=replay, early_rejection=early_rejection
    )
    result = ecmh_jax.sample(
        jax.random.key(3),
        smollm2.language_model,
        smollm2.params,
        prompts,
        lengths,
        TUNING,
        config,
        prompt_ids=prompt_ids,
        chain_ids=chain_ids,
        num_slots=NUM_CHAINS,
        steps_per_tick=steps_per_tick,
    )
    expected = plain[refine_finished]
    np.testing.assert_array_equal(result.trace.tokens, expected.trace.tokens)
    np.testing.assert_allclose(result.trace.log_prob, expected.trace.log_prob, atol=1e-5)
    for name in ("attempted", "accepted", "cut", "divergence"):
        np.testing.assert_array_equal(getattr(result.info, name), getattr(expected.info, name))
    assert 0 < result.stats.accepted.sum() < result.stats.attempted.sum()
    assert not result.stats.saved[4:].any()
