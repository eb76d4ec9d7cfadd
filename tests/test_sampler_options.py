"""``--option``: settings of samplers from text, and what is said of bad ones."""

import pytest

from ecmh_jax import best_of_n, published, smc, tmc
from experiments.sampler_options import describe_settings, read_options


def test_settings_are_read_by_their_types():
    texts = (
        "smc.num_particles=16",
        "smc.resample_below=0.25",
        "tmc.jackknife=false",
        "tmc.base_weight=importance",
        "best_of_n.rows=8",
    )
    options = read_options(
        ("entropy_cut", "smc", "tmc", "best_of_n", "published_uniform_cut"), texts
    )
    assert options == {
        "entropy_cut": None,
        "smc": smc.Options(num_particles=16, resample_below=0.25),
        "tmc": tmc.Options(jackknife=False, base_weight="importance"),
        "best_of_n": best_of_n.Options(rows=8),
        "published_uniform_cut": published.PUBLISHED_UNIFORM_CUT,
    }
    assert read_options(("best_of_n",), ("best_of_n.rows=None",))["best_of_n"].rows is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_particles=4", "expected SAMPLER.SETTING=VALUE"),
        ("smc.num_particles", "expected SAMPLER.SETTING=VALUE"),
        ("smc.num_particles=", "expected SAMPLER.SETTING=VALUE"),
        ("smd.num_particles=4", "expected one of smc,power_smc,tmc,best_of_n,multiple_try"),
        ("published_entropy_cut.cut=uniform_cut", "expected one of smc"),
        ("smc.particles=4", "expected a setting of smc: num_particles,resample_below"),
        ("smc.num_particles=many", "expected an integer"),
        ("smc.num_particles=0", "num_particles is 0; expected an integer of at least 1"),
        ("tmc.jackknife=perhaps", "expected true or false"),
        ("tmc.base_weight=none", "base_weight is 'none'; expected one of"),
        ("tmc.num_kept=65", "num_kept is 65; expected at most num_candidates"),
        ("multiple_try.num_tries=2", "expected a sampler of --sampler=smc,tmc"),
    ],
)
def test_bad_settings_are_named(text, message):
    with pytest.raises(ValueError, match="--option=") as caught:
        read_options(("smc", "tmc"), (text,))
    assert message in str(caught.value)


def test_help_names_every_setting():
    text = describe_settings()
    for name in ("smc.num_particles=64", "tmc.num_rollouts=8", "multiple_try.num_tries=4"):
        assert name in text
