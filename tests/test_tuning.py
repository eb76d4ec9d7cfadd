"""Values that only the host can catch: rounding in tunings, ids that do not fit."""

import dataclasses

import numpy as np
import pytest

from ecmh_jax import Config, checks, make_tuning
from ecmh_jax.token_law import weights_are_bounded


def test_a_temperature_of_one_over_power_stays_in_the_range_of_certain_rejection():
    powers = np.arange(10, 600) / 10
    tuning = make_tuning(len(powers), power=powers, proposal_temperature=1 / powers)
    np.testing.assert_array_equal(tuning.inverse_temperature, tuning.power)
    assert weights_are_bounded(tuning.power, tuning.inverse_temperature).all()


def test_scalars_and_arrays_give_the_same_tuning():
    scalar = make_tuning(3, 2.0, 0.25, 1.0, 0.5)
    arrays = make_tuning(3, [2.0] * 3, np.full(3, 0.25), (1, 1, 1), np.full(3, 0.5))
    for left, right in zip(scalar, arrays, strict=True):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == np.float32
        assert not left.weak_type


@pytest.mark.parametrize("ids", [[0, 2**32, 1], [0, -(2**31) - 1, 1]])
def test_ids_that_would_wrap_are_refused(ids):
    with pytest.raises(ValueError, match=r"chain_ids hold .* expected 32-bit"):
        checks.check_integers("chain_ids", ids, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 8.0}, r"max_new_tokens is 8\.0; expected an integer"),
        ({"eos_ids": [1]}, r"eos_ids is \[1\]; expected a tuple"),
        ({"eos_ids": 1}, "eos_ids is 1; expected a tuple"),
    ],
)
def test_settings_of_the_wrong_kind(changes, message):
    config = Config(prompt_length=2, max_new_tokens=8, num_stages=4)
    checks.check_config(config)
    with pytest.raises(ValueError, match=message):
        checks.check_config(dataclasses.replace(config, **changes))
