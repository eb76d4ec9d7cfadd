"""What the tests of the particle samplers share: runs on toys, their exact law, and mutants.

Mutants take a pytest monkeypatch and act on whatever is traced afterwards.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import make_tuning, particles, random_keys, rounds
from tests import enumeration, toy_chains
from tests.toy_models import ToyModel, random_toy_model, toy_language_model


@dataclasses.dataclass(frozen=True)
class Case:
    """One particle sampler on one toy model."""

    seed: int
    num_particles: int = 4
    resample_below: float = 1.0
    options: tuple = ()  # further settings of the sampler's own
    num_stages: int = 2
    vocabulary_size: int = 3
    horizon: int = 4
    power: float = 2.0
    proposal_temperature: float | None = 1.0
    top_k: int | None = None
    eos_boost: float = 0.0
    num_results: int = 4096

    def model(self) -> ToyModel:
        rng = np.random.default_rng(self.seed)
        return random_toy_model(
            rng, self.vocabulary_size, self.horizon, self.eos_boost, eos_rank=self.top_k
        )

    def unnormalised_target(self) -> tuple[enumeration.StateSpace, np.ndarray]:
        """The completions and p(x)^power of each."""
        model = self.model()
        space = enumeration.state_space(model, model.horizon, self.top_k)
        log_p = enumeration.laws(model, self.power, None, self.top_k).log_p
        return space, np.exp(self.power * space.along(log_p).sum(axis=1))


def options_of(sampler, case: Case):
    """The sampler's options in a case."""
    return sampler.Options(case.num_particles, case.resample_below, *case.options)


def build_run(sampler, case: Case, model=None):
    """Returns ``run(seed, prompt_ids, chain_ids) -> Result``, not compiled."""
    language_model, params = model or toy_language_model(case.model(), toy_chains.NUM_PROMPT_TOKENS)
    config = toy_chains.toy_config(case.model(), num_stages=case.num_stages, top_k=case.top_k)

    def run(seed, prompt_ids, chain_ids):
        num_results = len(chain_ids)
        prompts, lengths = map(jnp.asarray, toy_chains.toy_prompts(num_results))
        tuning = make_tuning(num_results, case.power, case.proposal_temperature)
        return rounds.run(
            sampler.build,
            jax.random.key(seed),
            language_model,
            params,
            rounds.Batch(prompts, lengths, prompt_ids, chain_ids, tuning),
            config,
            options_of(sampler, case),
        )

    return run


def run_compiled(sampler, case: Case, seed: int = 0, model=None):
    """All results of a case, from one freshly compiled program."""
    chain_ids = jnp.arange(case.num_results, dtype=jnp.int32)
    return jax.jit(build_run(sampler, case, model), static_argnums=0)(
        seed, jnp.zeros_like(chain_ids), chain_ids
    )


def errors(case: Case, result) -> np.ndarray:
    """Errors of the estimates of sum p^power f, in their own standard errors.

    E[Z f(X)] = sum_x p(x)^power f(x) for every N: for f = 1, the length, and each completion.
    """
    space, expected = case.unnormalised_target()
    rows = toy_chains.rows_of(result.trace, space)
    if (rows < 0).any():  # a trace that no target knows
        return np.array([np.inf])
    # A trace beside another particle's cache has other numbers than the table.
    log_p = space.along(enumeration.laws(case.model(), case.power, None, case.top_k).log_p)[rows]
    first = toy_chains.NUM_PROMPT_TOKENS
    stored = np.asarray(result.trace.log_prob)[:, first : first + log_p.shape[1]]
    if not np.allclose(stored, log_p, atol=1e-4):
        return np.array([np.inf])
    evidence = np.exp(np.asarray(result.info.log_evidence, np.float64))
    functions = np.concatenate(
        [np.ones((1, len(expected))), space.lengths[None], np.eye(len(expected))]
    )
    exact = functions @ expected
    estimates = evidence * functions[:, rows]
    # A completion that was never drawn has no variance of its own.
    least = functions**2 @ expected * expected.sum() - exact**2
    variance = np.maximum(estimates.var(axis=1), least)
    return np.abs(estimates.mean(axis=1) - exact) / np.sqrt(variance / len(rows) + 1e-12)


def total_variation(case: Case, result) -> tuple[float, float]:
    """Distance of the results' law from the target, and that of as many exact draws."""
    space, expected = case.unnormalised_target()
    expected = expected / expected.sum()
    rows = toy_chains.rows_of(result.trace, space)
    frequency = np.bincount(rows, minlength=len(expected)) / len(rows)
    floor = np.sqrt(expected * (1 - expected) / len(rows)).sum() * 0.5 * np.sqrt(2 / np.pi)
    return 0.5 * float(np.abs(frequency - expected).sum()), float(floor)


def same_results(result, other, pairs: dict[int, int]) -> bool:
    """Whether the rows ``pairs`` of two runs are the same results."""

    def row_of(result, row):
        return (
            # The prompts of these toys go by row and do not matter.
            np.asarray(result.trace.tokens)[row, toy_chains.NUM_PROMPT_TOKENS :].tolist(),
            int(result.trace.length[row]),
            int(result.stats.decoded[row]),
            np.asarray(result.info.resampled)[:, row].tolist(),
            int(result.info.chosen[row]),
        )

    rows, others = list(pairs.keys()), list(pairs.values())
    evidence = np.asarray(result.info.log_evidence)[rows]
    return all(row_of(result, row) == row_of(other, pairs[row]) for row in rows) and np.allclose(
        evidence, np.asarray(other.info.log_evidence)[others], atol=1e-5
    )


def failing_model(case: Case, fails):
    """The toy with logits that are NaN after a completion's first token where ``fails(token)``."""
    language_model, params = toy_language_model(case.model(), toy_chains.NUM_PROMPT_TOKENS)

    def decode(params, tokens, positions, cache):
        logits, cache = language_model.decode(params, tokens, positions, cache)
        failed = (positions == toy_chains.NUM_PROMPT_TOKENS) & fails(tokens)
        return jnp.where(failed[:, None], jnp.nan, logits), cache

    return language_model._replace(decode=decode), params


def weights_not_reset(patch):
    # The published sampler keeps an ancestor's weight, which then counts again.
    original = particles.resample

    def resample(population, due, uniform):
        resampled, rows = original(population, due, uniform)
        kept = jnp.take(population.log_weights.reshape(-1), rows)
        kept = kept.reshape(population.log_weights.shape)
        kept = kept - jax.nn.logsumexp(kept, axis=-1, keepdims=True)
        return resampled._replace(log_weights=kept), rows

    patch.setattr(particles, "resample", resample)


def resampled_by_wrong_weights(patch):
    original = particles.systematic_ancestors
    patch.setattr(
        particles,
        "systematic_ancestors",
        lambda log_weights, uniform: original(0.5 * log_weights, uniform),
    )


def cache_left_behind(patch):
    original = particles.take_rows

    def take_rows(tree, rows):
        # The toy's cache is the only bare array of two axes.
        return tuple(
            part if isinstance(part, jax.Array) and part.ndim == 2 else original(part, rows)
            for part in tree
        )

    patch.setattr(particles, "take_rows", take_rows)


def evidence_of_unweighted_means(patch):
    original = particles.reweight

    def reweight(population, log_increments):
        increments = log_increments.reshape(population.log_weights.shape)
        mean = jax.nn.logsumexp(increments, axis=-1) - jnp.log(float(increments.shape[1]))
        reweighted = original(population, log_increments)
        return reweighted._replace(log_evidence=population.log_evidence + mean)

    patch.setattr(particles, "reweight", reweight)


def drawn_without_weights(patch):
    original = particles.finish

    def finish(state, population, *rest):
        result = original(
            state,
            population._replace(log_weights=jnp.zeros_like(population.log_weights)),
            *rest,
        )
        return result

    patch.setattr(particles, "finish", finish)


def finished_reweighted(patch):
    original = particles.log_increment

    def log_increment(trace, previous_length, *rest):
        ended = (trace.length == previous_length).astype(jnp.int32)
        return original(trace, previous_length - ended, *rest)

    patch.setattr(particles, "log_increment", log_increment)


def uniform_shared_by_groups(patch):
    original = random_keys.group_uniform

    def group_uniform(keys, position):
        uniform = original(keys, position)
        return jnp.broadcast_to(uniform[:1], uniform.shape)

    patch.setattr(random_keys, "group_uniform", group_uniform)


def ramp_left_unfinished(patch):
    original = particles.log_increment

    def log_increment(trace, previous_length, finite, power, target_power, previous_power):
        ends_the_ramp = target_power is power
        previous_power = power if ends_the_ramp else previous_power
        return original(trace, previous_length, finite, power, target_power, previous_power)

    patch.setattr(particles, "log_increment", log_increment)


def ramp_without_earlier_tokens(patch):
    original = particles.log_increment

    def log_increment(trace, previous_length, finite, power, target_power, previous_power):
        return original(trace, previous_length, finite, power, target_power, target_power)

    patch.setattr(particles, "log_increment", log_increment)


TELLING = Case(seed=1, resample_below=0.8, num_stages=4, eos_boost=-2.0, num_results=2048)
UNEVEN = dataclasses.replace(TELLING, seed=4)  # weights often unequal when the next ones come
LAW_MUTANTS = {
    weights_not_reset: TELLING,
    resampled_by_wrong_weights: TELLING,
    cache_left_behind: TELLING,
    evidence_of_unweighted_means: UNEVEN,
    drawn_without_weights: TELLING,
    finished_reweighted: dataclasses.replace(TELLING, eos_boost=0.0),
}
