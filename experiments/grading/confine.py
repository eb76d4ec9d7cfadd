"""Runs inside the sandbox ahead of the program: gives up the user, sets limits, says so, starts it.

``sandbox.py`` hands this file's text to ``python -I -S -c``; it imports nothing of the project.
Arguments: limits as ``NAME=VALUE`` of the resource module, ``user=ID`` to become that user,
``packages=FOLDER`` to import from. Standard input: the program's length in bytes and a newline,
the program, and what the program itself is to read.
"""

import contextlib
import os
import resource
import sys

CONFINED = b"confined\n"  # the first line on standard output: what follows is the program's


def confine(settings: dict[str, str]) -> None:
    """Takes the limits and the user of ``settings``; there is no way back."""
    # Should the host run out of memory all the same, the kernel ends this process first.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    for name, text in settings.items():
        if name.startswith("RLIMIT_") and hasattr(resource, name):
            kind, value = getattr(resource, name), int(text)
            _, most = resource.getrlimit(kind)
            if most != resource.RLIM_INFINITY:
                value = min(value, most)
            # A second between the signal that a program may catch and the one that it may not.
            hard = value + 1 if name == "RLIMIT_CPU" and value != most else value
            # macOS refuses some limits, such as that on address space.
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, (value, hard))
    if "user" in settings:
        user = int(settings["user"])
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def read_program() -> str:
    """Reads the program off standard input, not one byte more."""
    header = b""
    while not header.endswith(b"\n"):
        header += os.read(0, 1)
    length, parts = int(header), []
    while length:
        part = os.read(0, min(length, 1 << 16))
        if not part:
            raise EOFError("the program is incomplete")
        parts.append(part)
        length -= len(part)
    return b"".join(parts).decode("utf-8", "surrogatepass")


def main() -> None:
    """Confines this process and runs the program as ``__main__``."""
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    program = read_program()
    confine(settings)
    if "packages" in settings:
        sys.path.append(settings["packages"])
    sys.argv = ["program"]
    os.write(1, CONFINED)
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
