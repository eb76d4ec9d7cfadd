"""Reading a run's records: small ones by hand, real ones against steps taken one by one."""

import dataclasses
import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import Info, Trace, build_extend, build_kernel, convergence, diagnostics, init
from ecmh_jax.proposal_record import Proposal
from tests import hashed_model

# [2 stages, 3 steps, 2 chains]; chain 1 is frozen in stage 2.
ATTEMPTED = np.array([[[1, 1], [1, 1], [1, 1]], [[1, 0], [1, 0], [1, 0]]], bool)
ACCEPTED = np.array([[[1, 0], [0, 0], [1, 1]], [[0, 0], [1, 0], [0, 0]]], bool)
CUT = np.array([[[1, 4], [2, 3], [4, 1]], [[8, 0], [3, 0], [5, 0]]])
CURRENT_LENGTH = np.array([[[4, 4], [4, 4], [4, 4]], [[8, 0], [8, 0], [5, 0]]])


def make_info(**fields) -> Info:
    """The records above; fields that a test does not name are zero."""
    zeros = np.zeros(ATTEMPTED.shape, np.int32)
    settings = {
        "attempted": ATTEMPTED,
        "accepted": ACCEPTED,
        "cut": CUT,
        "current_length": CURRENT_LENGTH,
        "proposal": (),
    } | fields
    return Info(**{name: settings.get(name, zeros) for name in Info._fields})


INFO = make_info()


def make_trace(tokens, length) -> Trace:
    tokens = np.asarray(tokens, np.int32)
    statistic = np.zeros(tokens.shape, np.float32)
    return Trace(tokens, np.asarray(length, np.int32), *[statistic] * 4)


def test_acceptance_by_stage():
    np.testing.assert_array_equal(diagnostics.acceptance_by_stage(INFO), [3 / 6, 1 / 3])
    on_device = jax.tree.map(jnp.asarray, INFO)
    np.testing.assert_array_equal(diagnostics.acceptance_by_stage(on_device), [3 / 6, 1 / 3])


def test_acceptance_of_a_stage_without_attempts_is_nan():
    nothing = make_info(attempted=np.zeros_like(ATTEMPTED), accepted=np.zeros_like(ATTEMPTED))
    assert np.isnan(diagnostics.acceptance_by_stage(nothing)).all()
    no_steps = jax.tree.map(lambda record: record[:, :0], INFO)
    assert diagnostics.acceptance_by_stage(no_steps).shape == (2,)
    assert np.isnan(diagnostics.acceptance_by_stage(no_steps)).all()


def test_cuts_by_their_place_in_the_completion():
    # (t - 1) / n: 0, 3/4, 1/4, 2/4, 3/4, 0 in stage 1; 7/8, 2/8, 4/5 in stage 2.
    np.testing.assert_array_equal(diagnostics.cut_histogram(INFO, 4), [2, 2, 1, 4])
    np.testing.assert_array_equal(diagnostics.cut_histogram(INFO, 1), [9])
    # Of the bins: (1, 0), (0, 1), (0), (0, 1, 0, 0).
    np.testing.assert_array_equal(
        diagnostics.acceptance_by_cut(INFO, 4), [2 / 2, 1 / 2, 0 / 1, 1 / 4]
    )
    np.testing.assert_array_equal(
        diagnostics.acceptance_by_cut(INFO, 10),
        [1, np.nan, 1 / 2, *[np.nan] * 2, 0, np.nan, 1 / 2, 0, np.nan],
    )


def test_cuts_by_their_distance_from_the_prompt():
    histogram = diagnostics.cut_histogram(INFO, 8, longest=8)
    np.testing.assert_array_equal(histogram, np.bincount(CUT[ATTEMPTED] - 1, minlength=8))
    np.testing.assert_array_equal(diagnostics.acceptance_by_cut(INFO, 2, longest=8), [4 / 7, 0 / 2])


def test_a_slice_of_the_records_is_looked_at_alone():
    last_stage = jax.tree.map(lambda record: record[-1], INFO)
    np.testing.assert_array_equal(diagnostics.cut_histogram(last_stage, 4), [0, 1, 0, 2])


def test_bins_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="num_bins is 0; expected at least 1"):
        diagnostics.cut_histogram(INFO, 0)
    with pytest.raises(ValueError, match="longest is 7; expected at least the last cut, 8"):
        diagnostics.acceptance_by_cut(INFO, 2, longest=7)


def test_draws_of_a_stage():
    record = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    np.testing.assert_array_equal(diagnostics.chain_draws(record), record[1].T)
    np.testing.assert_array_equal(diagnostics.chain_draws(record, 0), record[0].T)
    np.testing.assert_array_equal(
        diagnostics.chain_draws(record, None), np.concatenate([record[0].T, record[1].T], axis=1)
    )
    mask = np.array([True, False, False, True, False])
    for chains in (mask, [0, 3], slice(0, 4, 3)):
        np.testing.assert_array_equal(
            diagnostics.chain_draws(record, 1, chains), record[1].T[[0, 3]]
        )
    assert diagnostics.chain_draws(np.zeros((2, 3, 5, 7))).shape == (5, 3, 7)


def test_records_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"record has shape \(3, 5\); expected \[num_stages"):
        diagnostics.chain_draws(np.zeros((3, 5)))
    for stage in (2, -3):
        with pytest.raises(ValueError, match=rf"stage is {stage}; expected -2\.\.1 or None"):
            diagnostics.chain_draws(np.zeros((2, 3, 5)), stage)


def test_lengths_are_those_of_the_steps_taken_one_by_one():
    # Chains freeze when they end, and a completion of one token has no cut.
    config = dataclasses.replace(
        hashed_model.CONFIG, num_stages=6, refine_finished=False, cut_first_token=False
    )
    num_chains = len(hashed_model.PROMPTS)
    axes = (config.num_stages, config.steps_per_stage, num_chains)
    extend = jax.jit(build_extend(hashed_model.MODEL, config))
    kernel = jax.jit(build_kernel(hashed_model.MODEL, config))
    params, tuning = hashed_model.make_params(), hashed_model.TUNING
    identity = jnp.arange(num_chains)
    start = init(
        hashed_model.MODEL,
        params,
        jnp.asarray(hashed_model.PROMPTS),
        jnp.asarray(hashed_model.LENGTHS),
        jnp.zeros_like(identity),
        identity,
        config,
    )
    without_cut = frozen = moved = 0
    for seed in range(6):
        key, state, records, lengths = jax.random.key(seed), start, [], []
        for _ in range(config.num_stages):
            state = extend(key, state, params, tuning)
            for _ in range(config.steps_per_stage):
                state, info = kernel(key, state, params, tuning)
                records.append(info)
                lengths.append(np.asarray(state.trace.length) - hashed_model.LENGTHS)
        info = jax.tree.map(lambda *fields: np.stack(fields).reshape(axes), *records)
        expected = np.stack(lengths).reshape(axes)
        found = diagnostics.completion_lengths(info, state.trace, hashed_model.LENGTHS)
        np.testing.assert_array_equal(found, expected)
        without_cut += (~info.attempted & (expected == 1) & (expected[-1:, -1:] > 1)).sum()
        frozen += (~info.attempted & (expected > 1)).sum()
        moved += (info.accepted & (info.proposal_length != info.current_length)).sum()
    # Without these the test would compare little.
    assert min(without_cut, frozen, moved) > 5


# Of the records above: chain 0 goes on, chain 1 stays as stage 1 left it.
PROPOSAL_LENGTH = np.array([[[4, 4], [4, 4], [4, 3]], [[8, 0], [5, 0], [8, 0]]])
LOG_PROB = np.array([[[-9, -8], [-7, -8], [-6, -5]], [[-11, -5], [-10, -5], [-10, -5]]], np.float32)
MEAN_ENTROPY = LOG_PROB / -4
READ = make_info(proposal_length=PROPOSAL_LENGTH, log_prob=LOG_PROB, mean_entropy=MEAN_ENTROPY)
FINAL = make_trace(np.zeros((2, 12)), [2 + 5, 1 + 3])


def test_quantities_of_every_step():
    found = diagnostics.chain_quantities(READ, FINAL, [2, 1])
    assert set(found) == {"log_prob", "num_tokens", "mean_entropy"}
    np.testing.assert_array_equal(found["log_prob"], [[-11, -10, -10], [-5, -5, -5]])
    np.testing.assert_array_equal(found["num_tokens"], [[8, 5, 5], [3, 3, 3]])
    np.testing.assert_array_equal(found["mean_entropy"], found["log_prob"] / -4)
    one = diagnostics.chain_quantities(READ, FINAL, [2, 1], stage=0, chains=[1])
    np.testing.assert_array_equal(one["log_prob"], [[-8, -8, -5]])
    np.testing.assert_array_equal(one["num_tokens"], [[4, 4, 3]])
    with pytest.raises(ValueError, match=r"stage is 2; expected -2\.\.1 or None"):
        diagnostics.chain_quantities(READ, FINAL, [2, 1], stage=2)


def test_summaries_are_of_the_draws():
    found = diagnostics.summarise_chains(READ, FINAL, [2, 1], stage=None)
    for name, draws in diagnostics.chain_quantities(READ, FINAL, [2, 1], stage=None).items():
        assert draws.shape == (2, 6)
        np.testing.assert_equal(found[name], convergence.summarise(draws))
    assert found["log_prob"].mean == LOG_PROB.mean()
    assert found["num_tokens"].mean == np.mean([4, 4, 4, 8, 5, 5, 4, 4, 3, 3, 3, 3])


def test_chains_frozen_apart_have_not_mixed():
    apart, alike = (np.broadcast_to(np.float32(draws), (1, 6, 2)) for draws in ([-3, -8], -3))
    frozen = np.zeros((1, 6, 2), np.int32)
    info = Info(*[frozen] * 8, log_prob=apart, mean_entropy=alike)
    found = diagnostics.summarise_chains(info, FINAL, [2, 1])
    assert np.isinf(found["log_prob"].r_hat)
    assert np.isinf(found["num_tokens"].r_hat)
    assert np.isnan(found["mean_entropy"].r_hat)


def test_distinct_traces():
    tokens = [[1, 2, 7], [1, 2, 7], [1, 2, 3], [1, 2, 7], [1, 2, 7], [1, 5, 7]]
    trace = make_trace(tokens, [2, 2, 3, 2, 3, 2])
    found = diagnostics.distinct_traces(trace, np.array([4, 4, 4, -1, -1, 4]))
    np.testing.assert_array_equal(found.prompt_ids, [-1, 4])
    np.testing.assert_array_equal(found.num_chains, [2, 4])
    # 7 is the padding and a token: chains 3 and 4 differ in length alone.
    np.testing.assert_array_equal(found.num_distinct, [2, 3])


def test_one_prompt_id_a_chain():
    trace = make_trace([[1], [2]], [1, 1])
    with pytest.raises(ValueError, match=r"prompt_ids have shape \(3,\); expected \(2,\)"):
        diagnostics.distinct_traces(trace, [0, 0, 0])


def test_answer_indicator():
    answers = [["4", None], ["x", "4"]]
    np.testing.assert_array_equal(diagnostics.answer_indicator(answers, "4"), [[1, 0], [0, 1]])
    np.testing.assert_array_equal(diagnostics.answer_indicator([None, 3], None), [0, 0])
    assert diagnostics.answer_indicator(["4"], "4").dtype == np.float64


def test_answer_agreement():
    answers = [
        ["a", None, "b", "a"],
        ["b", None, "a", None],
        [3, 3, 3, 3],
        [None, None, None, None],
    ]
    agreement = diagnostics.answer_agreement(np.array(answers, dtype=object).T)
    np.testing.assert_array_equal(agreement, [2 / 4, 1 / 4, 1, 0])
    with pytest.raises(ValueError, match=r"answers have shape \(2,\); expected \[C, N\]"):
        diagnostics.answer_agreement(["a", "b"])


def test_data_tree_holds_the_run():
    pytest.importorskip("arviz_base")
    draws = np.arange(6.0).reshape(2, 3)
    info = make_info(log_ratio=np.linspace(-1, 0, 12, dtype=np.float32).reshape(2, 3, 2))
    tree = diagnostics.to_data_tree({"log_prob": draws, "length": jnp.ones((2, 3), int)}, info)
    assert set(tree.children) == {"posterior", "sample_stats"}
    assert tree["posterior/log_prob"].dims == ("chain", "draw")
    np.testing.assert_array_equal(tree["posterior/log_prob"], draws)
    np.testing.assert_array_equal(tree["posterior/length"], np.ones((2, 3)))
    assert set(tree["sample_stats"].data_vars) == set(Info._fields) - {"proposal"}
    for name in tree["sample_stats"].data_vars:
        np.testing.assert_array_equal(tree[f"sample_stats/{name}"], getattr(info, name)[-1].T)
    one = diagnostics.to_data_tree({"log_prob": draws[1:]}, info, stage=0, chains=[1])
    np.testing.assert_array_equal(one["sample_stats/cut"], CUT[0, :, 1][None])


def test_data_tree_holds_the_proposals():
    pytest.importorskip("arviz_base")
    rng = np.random.default_rng(0)
    tokens = {"current_tokens", "current_entropy", "proposal_tokens", "proposal_entropy"}
    proposal = Proposal(
        *(rng.normal(size=(2, 3, 2, *[7] * (name in tokens))) for name in Proposal._fields)
    )
    quantities = diagnostics.chain_quantities(READ, FINAL, [2, 1])
    tree = diagnostics.to_data_tree(quantities, READ._replace(proposal=proposal))
    assert set(tree["posterior"].data_vars) == set(quantities)
    names = {*Info._fields, *Proposal._fields} - {"proposal"}
    assert set(tree["sample_stats"].data_vars) == names
    np.testing.assert_array_equal(tree["sample_stats/stopped"], proposal.stopped[-1].T)
    np.testing.assert_array_equal(
        tree["sample_stats/proposal_tokens"], proposal.proposal_tokens[-1].swapaxes(0, 1)
    )


def test_data_tree_without_records_keeps_further_axes():
    pytest.importorskip("arviz_base")
    # More chains than draws, of which ArviZ by itself would warn.
    tree = diagnostics.to_data_tree({"entropy": np.zeros((5, 3, 7))})
    assert set(tree.children) == {"posterior"}
    assert tree["posterior/entropy"].shape == (5, 3, 7)


def test_arviz_reads_the_data_tree():
    pytest.importorskip("arviz_base")
    arviz = pytest.importorskip("arviz_stats")
    pytest.importorskip("xarray_einstats")
    draws = np.random.default_rng(0).normal(size=(4, 50))
    tree = diagnostics.to_data_tree({"log_prob": draws})
    for value, expected in (
        (arviz.ess(tree, method="mean"), convergence.effective_sample_size(draws)),
        (arviz.ess(tree), convergence.bulk_effective_sample_size(draws)),
        (
            arviz.ess(tree, method="tail", prob=(0.05, 0.95)),
            convergence.tail_effective_sample_size(draws),
        ),
        (arviz.rhat(tree), convergence.split_r_hat(draws)),
    ):
        np.testing.assert_allclose(float(value["log_prob"]), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("quantities", "info", "message"),
    [
        ({}, INFO, "expected at least one quantity"),
        ({"log_prob": np.zeros(3)}, None, "expected at least one quantity"),
        ({"log_prob": np.zeros((3, 2))}, INFO, "expected the same C and N"),
        ({"length": np.zeros((3, 2))}, INFO, "expected the same C and N"),
        ({"a": np.zeros((3, 2)), "b": np.zeros((3, 4))}, None, "expected the same C and N"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(quantities, info, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.to_data_tree(quantities, info)


def test_the_missing_extra_is_named(monkeypatch):
    def is_missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", is_missing)
    with pytest.raises(ValueError, match=r"pip install 'ecmh_jax\[arviz\]'"):
        diagnostics.to_data_tree({"log_prob": np.zeros((2, 3))})


def test_the_library_does_not_load_the_extra():
    program = (
        "import sys\nfrom ecmh_jax import convergence, diagnostics\n"
        "assert not [name for name in sys.modules if name.startswith(('arviz', 'xarray'))]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
