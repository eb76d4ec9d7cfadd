"""Faults in the code that every form of the sampler shares; each takes a pytest monkeypatch.

They act on whatever is traced afterwards: a program that is compiled already stays as it was.
"""

import jax
import jax.numpy as jnp

from ecmh_jax import acceptance, cut, random_keys, suffix, token_law, transition


def capped_at_current_length(patch):
    original = suffix.draw_suffix

    def draw_suffix(model, config, params, tuning, current, prompt_length, plan, *rest):
        capped = plan._replace(horizon=jnp.minimum(plan.horizon, current.length))
        return original(model, config, params, tuning, current, prompt_length, capped, *rest)

    patch.setattr(suffix, "draw_suffix", draw_suffix)


def sliced_suffix(patch):
    original = suffix.draw_suffix

    def draw_suffix(model, config, params, tuning, current, *rest):
        drawn, cache = original(model, config, params, tuning, current, *rest)
        slots = jnp.arange(config.num_slots)[None]
        cut_off = (slots >= drawn.trace.length[:, None]) & (slots < current.length[:, None])
        forgotten = jnp.where(cut_off, current.log_weight, 0.0).sum(axis=-1)
        return drawn._replace(log_ratio=drawn.log_ratio + forgotten), cache

    patch.setattr(suffix, "draw_suffix", draw_suffix)


def eos_masked_at_the_cut(patch):
    # The published sampler forbids end-of-sequence as the first token of a proposal.
    original = suffix.draw_suffix

    def draw_suffix(model, config, *arguments):
        first = arguments[-2].trace.length

        def decode(params, tokens, positions, cache):
            logits, cache = model.decode(params, tokens, positions, cache)
            masked = logits.at[:, config.eos_ids[0]].set(-jnp.inf)
            return jnp.where((positions == first - 1)[:, None], masked, logits), cache

        masking = model._replace(decode=decode)
        return original(masking, config, *arguments)

    patch.setattr(suffix, "draw_suffix", draw_suffix)


def cut_term_left_out(patch):
    def log_ratio(ratio, num_cuts, uniform_mix):
        return ratio.log_reverse + ratio.log_weight_sum

    def begin(*arguments):
        ratio = original(*arguments)
        return ratio._replace(log_reverse=ratio.log_reverse + arguments[3])

    original = acceptance.begin
    patch.setattr(acceptance, "begin", begin)
    patch.setattr(acceptance, "log_ratio", log_ratio)


def untruncated_q(patch):
    original = token_law.draw_token

    def draw_token(logits, uniforms, power, inverse_temperature, excluded, top_k):
        drawn = original(logits, uniforms, power, inverse_temperature, excluded, top_k)
        tempered = jax.nn.log_softmax(inverse_temperature[:, None] * logits, axis=-1)
        log_q = jnp.take_along_axis(tempered, drawn.token[:, None], axis=-1)[:, 0]
        return drawn._replace(log_weight=power * drawn.log_prob - log_q)

    patch.setattr(token_law, "draw_token", draw_token)


def reused_key(patch):
    # One number decides both where to cut and whether to accept.
    patch.setattr(random_keys, "accept_uniform", random_keys.cut_uniform)


def off_by_one_at_eos(patch):
    original = cut.num_uniform_cuts

    def num_uniform_cuts(prompt_length, length, cut_first_token):
        return jnp.maximum(original(prompt_length, length, cut_first_token) - 1, 1)

    def begin(log_weight, entropy, law, log_cut, cut_slot, divergence, length):
        return original_begin(log_weight, entropy, law, log_cut, cut_slot, divergence, length - 1)

    original_begin = acceptance.begin
    patch.setattr(cut, "num_uniform_cuts", num_uniform_cuts)
    patch.setattr(acceptance, "begin", begin)


def stale_cache_row(patch):
    original = transition.select

    def select(rows, new, old):
        keep_rejected = not isinstance(new, tuple)  # the toy's cache is one array, a trace is not
        return new if keep_rejected else original(rows, new, old)

    patch.setattr(transition, "select", select)


def excluded_token_forgotten(patch):
    original = token_law.draw_token

    def draw_token(logits, uniforms, power, inverse_temperature, excluded, top_k):
        nothing = jnp.full_like(excluded, -1)
        return original(logits, uniforms, power, inverse_temperature, nothing, top_k)

    patch.setattr(token_law, "draw_token", draw_token)


def bound_used_outside_its_range(patch):
    def always(power, inverse_temperature):
        return jnp.ones_like(power, bool)

    patch.setattr(token_law, "weights_are_bounded", always)


def bound_without_the_cut_term(patch):
    # Rejects on the weights alone, which do not bound a ratio whose cut term is positive.
    original_begin, original_ratio = acceptance.begin, acceptance.log_ratio

    def begin(log_weight, entropy, law, log_cut, *slots):
        ratio = original_begin(log_weight, entropy, law, log_cut, *slots)
        return ratio._replace(
            log_reverse=ratio.log_reverse + log_cut,
            log_cut_weight=ratio.log_cut_weight - log_cut,
        )

    def log_ratio(ratio, num_cuts, uniform_mix):
        weights_alone = ratio.log_reverse + ratio.log_weight_sum
        return jnp.minimum(original_ratio(ratio, num_cuts, uniform_mix), weights_alone)

    patch.setattr(acceptance, "begin", begin)
    patch.setattr(acceptance, "log_ratio", log_ratio)
