"""The Hub, through huggingface_hub alone: whose token it is, what a repository holds, uploading one
commit, downloading one snapshot, and what errors mean for the user.

The token is the one that huggingface_hub finds (HF_TOKEN, or the one saved at login). No message
contains it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..core.errors import Ar2DiffError, first_line, option

OTHER_TYPES = {"dataset": "data set", "space": "Space"}


class NotAsked(Ar2DiffError):
    """The Hub could not be asked: there is no token or no connection, or it is switched off."""


@dataclass(frozen=True)
class Target:
    """A repository to publish to, as it was found.

    Attributes:
        name: name with the owner.
        private: what the user asked for; False leaves the choice to the Hub.
        head: the newest commit; None if the repository does not exist yet.
        files: paths of the files in it.
    """

    name: str
    private: bool = False
    head: str | None = None
    files: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """The address of the repository's page."""
        return f"{constants.ENDPOINT}/{self.name}"


def find_target(name: str, private: bool = False) -> Target:
    """Look up a repository to write to. Changes nothing.

    Args:
        name: name of the repository; if it has no owner, the user of the token is the owner.
        private: whether the repository must be private.

    Raises:
        NotAsked: there is no token, or no connection.
        Ar2DiffError: the token lacks write access; the name is invalid, or belongs to a data set or
            Space; the repository is public but must not be.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise Ar2DiffError(
            f"repository {name!r}: {first_line(error)}", "give a name like user/stories"
        ) from None
    user = check_token()
    name = name if "/" in name else f"{user}/{name}"
    with asking():
        api = HfApi()
        try:
            info = api.model_info(name)
        except RepositoryNotFoundError:
            for kind, said in OTHER_TYPES.items():
                if api.repo_exists(name, repo_type=kind):
                    raise Ar2DiffError(
                        f"{name} is a {said} on the Hub, not a model",
                        "choose another name for the model",
                    ) from None
            return Target(name, private)
    if private and not info.private:
        raise Ar2DiffError(
            f"repository {name} is public, but must be private",
            "make it private in its settings on the Hub, or choose another name",
        )
    return Target(name, private, info.sha, tuple(file.rfilename for file in info.siblings))


def check_token() -> str:
    """The name of the user whose token it is.

    Raises:
        Ar2DiffError: there is no token, the Hub does not recognize it, or it is read-only.
    """
    with asking():
        token = get_token()
        if not token:
            raise NotAsked("there is no token for the Hub", "run 'hf auth login', or set HF_TOKEN")
        if not (token.isascii() and token.isprintable()):  # an HTTP header cannot carry it
            raise _wrong_token()
        known = HfApi().whoami()
    if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise Ar2DiffError(
            f"the token of {known['name']} is read-only",
            f"create one with write access at {constants.ENDPOINT}/settings/tokens",
        )
    return known["name"]


def upload(target: Target, files: dict[str, Path | bytes], stale: list[str], message: str) -> str:
    """Create the repository if necessary, and upload files in one commit: all of them or none.

    Args:
        files: {path in the repository: local file, or content}.
        stale: paths in the repository to remove.
        message: commit message.

    Returns:
        The new commit, or the old head if nothing has changed.

    Raises:
        Ar2DiffError: the upload failed, or is not allowed.
    """
    api, head = HfApi(), target.head
    with asking(target.name):
        if head is None:
            api.create_repo(target.name, private=target.private or None)
            head = api.model_info(target.name).sha
    # Not `upload_folder`, which may split a folder over several commits.
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in stale]
    with asking(target.name, uploading=True):
        commit = api.create_commit(
            target.name, operations, commit_message=message, parent_commit=head
        )
    return commit.oid


def download(
    name: str, commit: str | None, folder: Path, patterns: list[str] | None = None
) -> Path:
    """Download the files of a repository to a fresh folder, without a cache.

    Raises:
        Ar2DiffError: they cannot be downloaded.
    """
    with asking(name):
        snapshot_download(name, revision=commit, local_dir=folder, allow_patterns=patterns)
    return folder


def matching(paths: tuple[str, ...], patterns: list[str]) -> list[str]:
    """The paths whose first component matches one of the patterns."""
    return [p for p in paths if any(fnmatch(p.split("/")[0], pattern) for pattern in patterns)]


def reason(error: BaseException) -> str:
    """The message of an error from the Hub or the connection, on one line and without the token."""
    said, token = first_line(error), os.environ.get("HF_TOKEN") or _saved_token()
    return said.replace(token, "...") if token else said


@contextmanager
def asking(name: str = "", uploading: bool = False) -> Iterator[None]:
    """Translate errors from the Hub or the connection into what they mean for the user.

    Args:
        name: name of the repository in question.
        uploading: whether files are being uploaded to it.
    """
    try:
        yield
    except Ar2DiffError:
        raise
    except Exception as error:  # httpx, the system and huggingface_hub raise their own
        # The error is not chained to ours, because its headers may hold the token.
        raise _explained(error, name, uploading) from None


def _explained(error: Exception, name: str, uploading: bool) -> Ar2DiffError:
    if isinstance(error, OfflineModeIsEnabled):
        return NotAsked("HF_HUB_OFFLINE is set, so the Hub is not used", "unset HF_HUB_OFFLINE")
    response = error.response if isinstance(error, HfHubHTTPError) else None
    status = response.status_code if response is not None else None
    ours = response is not None and "/api/" in str(response.url)  # not from the Hub's storage
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return _wrong_token()
    if isinstance(error, RepositoryNotFoundError):
        return Ar2DiffError(f"there is no repository {name} on the Hub", "check the name")
    if status == 403 and ours:
        return Ar2DiffError(
            f"the token has no write access to {name}",
            "choose a repository of your own, or use a token with write access",
        )
    if status == 412:
        return Ar2DiffError(f"repository {name} has changed since it was checked", "push again")
    if isinstance(error, ValueError) and "metadata" in str(error):
        lines = [line.removeprefix("- ") for line in str(error).strip().splitlines()[1:]]
        return Ar2DiffError(
            f"the Hub rejects the card: {'; '.join(lines)}",
            f"set {option('license')} to an identifier from the Hub's list (apache-2.0, mit, "
            "other ...)",
        )
    if uploading:
        return Ar2DiffError(
            f"the upload to {name} failed ({reason(error)}); the repository is unchanged",
            "push again; files that were uploaded completely are not sent twice",
        )
    if status is not None:
        return Ar2DiffError(f"the Hub rejects the request ({reason(error)})", "try again later")
    return NotAsked(
        f"the Hub ({constants.ENDPOINT}) cannot be reached ({reason(error)})",
        "check the connection and HF_ENDPOINT",
    )


def _wrong_token() -> Ar2DiffError:
    source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the login"
    return Ar2DiffError(
        f"the Hub does not recognize the token from {source}",
        f"create one with write access at {constants.ENDPOINT}/settings/tokens, then "
        + ("set HF_TOKEN to it" if source == "HF_TOKEN" else "run 'hf auth login'"),
    )


def _saved_token() -> str | None:
    try:
        return get_token()
    except Exception:  # there is no token to hide
        return None
