"""``--option=SAMPLER.SETTING=VALUE``: settings of the samplers that have their own."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from ecmh_jax import group_sampling
from ecmh_jax.group_sampling import GROUP_SAMPLERS

_FIXED = ("published_entropy_cut", "published_uniform_cut")  # their faults are their definition


def describe_settings() -> str:
    """Every setting with its default, for ``--help``."""
    return ", ".join(
        f"{sampler}.{field.name}={getattr(GROUP_SAMPLERS[sampler].default, field.name)}"
        for sampler in _samplers_with_settings()
        for field in dataclasses.fields(GROUP_SAMPLERS[sampler].default)
    )


def read_options(samplers: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """Reads the options of each sampler of a run.

    Args:
      samplers: the run's samplers.
      settings: texts ``SAMPLER.SETTING=VALUE``.

    Returns:
      Sampler -> its ``Options``, or None for one that has none.

    Raises:
      ValueError: a setting is malformed, unknown, of a sampler that is not run, or out of range.
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in settings:
        sampler, name, value = _read_setting(text)
        if sampler not in samplers:
            raise ValueError(f"--option={text}; expected a sampler of --sampler={_join(samplers)}")
        changes.setdefault(sampler, {})[name] = value
    options: dict[str, Any] = {}
    for sampler in samplers:
        options[sampler] = None
        if sampler in GROUP_SAMPLERS:
            chosen = dataclasses.replace(
                GROUP_SAMPLERS[sampler].default, **changes.get(sampler, {})
            )
            try:
                options[sampler] = group_sampling.check_options(sampler, chosen)
            except ValueError as error:
                raise ValueError(f"--option={sampler}...: {error}") from error
    return options


def _samplers_with_settings() -> list[str]:
    return [sampler for sampler in GROUP_SAMPLERS if sampler not in _FIXED]


def _read_setting(text: str) -> tuple[str, str, Any]:
    name, _, value = text.partition("=")
    sampler, _, setting = name.partition(".")
    if not setting or not value:
        raise ValueError(f"--option={text}; expected SAMPLER.SETTING=VALUE")
    if sampler not in _samplers_with_settings():
        raise ValueError(f"--option={text}; expected one of {_join(_samplers_with_settings())}")
    options = GROUP_SAMPLERS[sampler].module.Options
    kinds = typing.get_type_hints(options)
    if setting not in kinds:
        raise ValueError(f"--option={text}; expected a setting of {sampler}: {_join(kinds)}")
    return sampler, setting, _read_value(text, value, kinds[setting])


def _read_value(text: str, value: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):  # X | None
        if value == "None":
            return None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return value  # the sampler's own check knows the words
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"--option={text}; expected true or false")
        return value.lower() == "true"
    try:
        return kind(value)
    except ValueError as error:
        number = "an integer" if kind is int else "a number"
        raise ValueError(f"--option={text}; expected {number}") from error


def _join(names: Any) -> str:
    return ",".join(names)
