"""From a frozen dataclass to absl flags and back, so that each setting is written down once."""

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from absl import app, flags, logging

from models.smollm2 import cache_folder

# --help then lists the flags under the launcher that asked for them.
flags.disclaim_key_flags()

ConfigType = TypeVar("ConfigType")

_DEFINE: dict[Any, Callable[..., flags.FlagHolder]] = {
    str: flags.DEFINE_string,
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
}


def setting(
    default: Any, help_text: str, choices: Sequence[str] | None = None, repeated: bool = False
) -> Any:
    """A field that is also a flag.

    Args:
      default: its default.
      help_text: what ``--help`` says.
      choices: the words that it may be, if they are few.
      repeated: for a tuple of strings, the flag is given once for each; else separated by commas.
    """
    metadata = {"help": help_text, "choices": choices, "repeated": repeated}
    return dataclasses.field(default=default, metadata=metadata)


def define_flags(
    config_class: type[ConfigType], argument: str | None = None
) -> Callable[..., ConfigType]:
    """Defines a flag for each field, and returns the function that reads the flags' values.

    Args:
      config_class: the frozen dataclass of the settings.
      argument: a field that is no flag; the function that is returned takes it by name.
    """
    kinds = typing.get_type_hints(config_class)
    holders = {
        field.name: _define_flag(field, kinds[field.name])
        for field in dataclasses.fields(typing.cast(Any, config_class))
        if field.name != argument
    }

    def read_flags(**others: str) -> ConfigType:
        values = {name: holder.value for name, holder in holders.items()}
        return config_class(
            **others,
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
            },
        )

    return read_flags


def _define_flag(field: dataclasses.Field, kind: Any) -> flags.FlagHolder:
    default: Any = field.default
    help_text, choices = field.metadata["help"], field.metadata["choices"]
    if choices:
        return flags.DEFINE_enum(field.name, default, choices, help_text)
    if isinstance(kind, types.UnionType):  # X | None: absent means None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        define = flags.DEFINE_multi_string if field.metadata["repeated"] else flags.DEFINE_list
        return define(field.name, list(default), help_text)
    return _DEFINE[kind](field.name, default, help_text)


def start(
    config_class: type[ConfigType], work: Callable[[ConfigType], int], argument: str | None = None
) -> None:
    """Defines the flags, parses them and runs ``work`` on the settings; does not return.

    Flags are defined here and not at import, so that one process may import several launchers.

    Args:
      config_class: the frozen dataclass of the settings.
      work: does the work and returns the exit status.
      argument: the field that is the command line's one argument beside the flags, if there is one.
    """
    read_flags = define_flags(config_class, argument)

    def main(arguments: list[str]) -> None:
        others = {}
        if argument is not None:
            if len(arguments) < 2:
                raise app.UsageError(f"expected an argument, {argument.upper()}")
            others[argument] = arguments.pop(1)
        run_main(arguments, lambda: work(read_flags(**others)))

    app.run(main)


def run_main(arguments: Sequence[str], launch: Callable[[], int]) -> None:
    """Runs a launcher: keeps compiled programs between starts, and turns errors into one line.

    Args:
      arguments: the command line without its flags, program first; takes no others.
      launch: does the work and returns the exit status.
    """
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}; settings are flags: --help")
    logging.set_verbosity(logging.WARNING)  # JAX tells of every platform that it does not find
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        status = launch()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status)
