"""A model of the Hugging Face hub as a local folder, pinned to one commit."""

import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import huggingface_hub.errors

from models import huggingface_config

# owner/name, or owner/name@revision; ./name is a path
_HUB_ID = re.compile(r"(?P<repo_id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETTINGS, _WEIGHTS = ["*.json", "*.jinja"], ["*.safetensors"]
_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights


class Snapshot(NamedTuple):
    """A folder of the hub's local cache.

    Attributes:
      folder: where the files are.
      repo_id: ``owner/name``.
      commit: the commit's full hash: with it the same files can be asked for again.
    """

    folder: Path
    repo_id: str
    commit: str


def parse_hub_id(name: str, revision: str | None = None) -> tuple[str, str | None] | None:
    """Splits ``owner/name@revision``.

    Args:
      name: what the user wrote.
      revision: a branch, tag or commit given apart from it.

    Returns:
      ``(repo_id, revision)``, the revision None where none is given; None if ``name`` does not
      have the form of a hub id.

    Raises:
      ValueError: two revisions are given and differ.
    """
    match = _HUB_ID.fullmatch(name)
    if match is None:
        return None
    inline = match["revision"]
    if inline and revision and inline != revision:
        raise ValueError(f"--model={name} and --revision={revision} differ; give one revision")
    return match["repo_id"], inline or revision


def fetch_snapshot(repo_id: str, revision: str | None) -> Snapshot:
    """Downloads a model, or finds it in the local cache.

    The settings come first and are checked, so that no weights of a model that is not supported
    are downloaded. ``HF_HUB_OFFLINE`` and the hub's other variables are honoured.

    Args:
      repo_id: ``owner/name``.
      revision: branch, tag or commit; None for the default branch's newest commit.

    Returns:
      The folder and the commit that it holds.

    Raises:
      FileNotFoundError: it does not exist, is not accessible, or is not cached while offline.
      ValueError: it is not a model that is supported.
    """
    snapshot = fetch_settings(repo_id, revision)
    huggingface_config.read_config(snapshot.folder)
    return snapshot._replace(folder=_download(repo_id, snapshot.commit, _SETTINGS + _WEIGHTS))


def fetch_settings(repo_id: str, revision: str | None) -> Snapshot:
    """The same for all but the weights, which are not checked either."""
    folder = _download(repo_id, revision, _SETTINGS)
    # The cache names a folder by its commit. Asking for exactly that one afterwards keeps the
    # files together when the branch moves in between.
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    if commit is None:
        raise ValueError(
            f"--model={repo_id}: the hub's cache folder {folder} does not name its commit; pin "
            f"one with --model={repo_id}@COMMIT"
        )
    return Snapshot(folder, repo_id, commit)


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    wanted = repo_id if revision is None else f"{repo_id}@{revision}"
    errors = huggingface_hub.errors
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED
            )
        )
    except errors.GatedRepoError as error:
        problem, cause = "it is gated: accept its terms on the hub and log in with `hf auth`", error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        problem, cause = "the hub has no such model or revision, or it is private", error
    except errors.HFValidationError as error:
        problem, cause = f"not a valid hub id: {error}", error
    except OSError as error:  # no network, offline mode, no space, HTTP errors
        problem = f"it could not be fetched and is not in the local cache ({error})"
        cause = error
    raise FileNotFoundError(
        f"--model={wanted}: {problem}. Pass a local folder or .gguf file, or --model=smollm2-135m"
    ) from cause
