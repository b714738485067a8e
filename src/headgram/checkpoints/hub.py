"""A checkpoint at the Hugging Face hub: its files at one commit, and ranges of their bytes.

Everything goes through huggingface_hub's own client, so its token, `HF_ENDPOINT`, proxies and offline mode hold here too,
and the client keeps the token from the other hosts that the hub redirects to. What is fetched goes to memory, never to disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from pydantic import BaseModel, Field

from headgram.checkpoints.answers import ATTEMPTS, answer, chunks, fetch, pause
from headgram.checkpoints.sources import HUB_DIGEST, json_object, largest_json
from headgram.checkpoints.weight_files import CONFIG, PARAMS, WeightFiles, choose_weights, config_of, described_by, format_of
from headgram.errors import HeadgramError
from headgram.foreign import first_problem, parse_json

#: A listing of 50,000 files is smaller.
_LARGEST_LISTING = 16 * 2**20
_COMMIT = re.compile(r"[0-9a-f]{7,64}")


class _Large(BaseModel):
    """What a listing says of the content of a large file."""

    sha256: str = Field(min_length=1, max_length=100)


class _Listed(BaseModel):
    """A file in a listing."""

    rfilename: str = Field(max_length=4096)
    size: int = Field(ge=0, lt=2**63)
    blobId: str = Field("", max_length=100)
    lfs: _Large | None = None


class _Listing(BaseModel):
    """What a hub says of a repository at a revision."""

    sha: str | None = None
    siblings: list[_Listed] = []


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a commit.

    Attributes
    ----------
    repo, name, commit
        Where it is.
    size
        Its length in bytes.
    etag
        The hub's hash of its content: SHA-256 for a large file.
    """

    repo: str
    name: str
    commit: str
    size: int
    etag: str

    @property
    def url(self) -> str:
        """Where the hub serves it."""
        return hf_hub_url(self.repo, self.name, revision=self.commit)

    def __str__(self) -> str:
        return f"{self.name} of {self.repo}"


@dataclass(frozen=True)
class RemoteLocation:
    """A source at the hub; the counterpart of `Location`.

    Attributes
    ----------
    repo, commit
        The repository, and the commit that its revision names.
    files
        All its files, by name.
    """

    repo: str
    commit: str
    files: dict[str, HubFile]

    @property
    def format(self) -> str:
        """`safetensors`: the only format that is read in ranges."""
        return format_of(self.weights[0])

    @property
    def where(self) -> str:
        """The source in words, for messages."""
        return f"{self.repo} at commit {self.commit[:12]}"

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weight files, in order."""
        return self.choice.files

    @cached_property
    def choice(self) -> WeightFiles:
        """Which files are the weights."""
        choice = choose_weights(self.files, self._json, self.where)
        for name in choice.files:
            self.file(name)
        if format_of(choice.files[0]) != "safetensors":
            raise HeadgramError(
                f"{self.where} holds '{choice.files[0]}', and only safetensors can be read at the hub: "
                f"fetch it with `hf download {self.repo} --revision {self.commit}`"
            )
        return choice

    @property
    def base(self) -> None:
        """Only an adapter has one."""
        return None

    @property
    def described_by(self) -> tuple[str, ...]:
        """What the lock pins beside the weights."""
        return described_by(self.choice, self.files)

    def file(self, name: str) -> HubFile:
        """A file of the repository, refused if it has none of this name."""
        if name not in self.files:
            raise HeadgramError(f"{self.where} lacks the file '{name}'")
        return self.files[name]

    def state(self, name: str) -> tuple[int, int]:
        """As of a `Location`; under a commit no file changes."""
        return self.size(name), 0

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self.file(name).size

    def sample(self, name: str) -> str:
        """What stands for a file's content in the lock: the hub's hash."""
        return HUB_DIGEST + self.file(name).etag

    def config(self, name: str = CONFIG) -> dict[str, Any] | None:
        """As of a `Location`."""
        if name in self.files:
            return self._json(name)
        return config_of(self._json(PARAMS)) if name == CONFIG and PARAMS in self.files else None

    def _json(self, name: str) -> dict[str, Any]:
        file = self.file(name)
        if file.size > (most := largest_json(name)):
            raise HeadgramError(f"{self.where}: {name} is larger than {most >> 20} MiB, which no real checkpoint's is")
        try:
            content = fetch(file.url, file.size, str(file))
        except (HfHubHTTPError, httpx.RequestError, OfflineModeIsEnabled) as error:
            raise HeadgramError(_refusal(error, self.repo, self.commit)) from None
        if len(content) < file.size:
            raise HeadgramError(f"the hub sends less of {file} than the {file.size:,} bytes of its own listing: try again")
        return json_object(content, f"{self.where}: {name}")


def locate_at_hub(repo: str, revision: str | None) -> RemoteLocation:
    """Resolve a revision to its commit, and list the files there. One request.

    Parameters
    ----------
    repo, revision
        Hub id, and branch, tag or commit; the main branch if None.

    Raises
    ------
    HeadgramError
        If the hub cannot be reached, refuses, or has no such repository or revision.
    """
    elsewhere = f"'{repo}' is neither a path (seen from {Path.cwd()}) nor in the local Hugging Face cache, and"
    if constants.is_offline_mode():
        command = f"hf download {repo}{f' --revision {revision}' if revision else ''}"
        raise HeadgramError(f"{elsewhere} HF_HUB_OFFLINE forbids to ask the hub: unset it, or fetch the model with `{command}`")
    # As `HfApi.model_info` does. An unreachable hub is reported at once: the id may just be a mistyped path.
    url = f"{constants.ENDPOINT}/api/models/{repo}/revision/{quote(revision or constants.DEFAULT_REVISION, safe='')}"
    try:
        content = fetch(url, _LARGEST_LISTING, f"'{repo}'", params={"blobs": True})
    except (HfHubHTTPError, httpx.RequestError, OfflineModeIsEnabled) as error:
        raise HeadgramError(f"{elsewhere} {_refusal(error, repo, revision)}") from None
    try:
        listing = _Listing.model_validate(parse_json(content), strict=True)
        named = {each.rfilename: each for each in listing.siblings}
        files = {name: HubFile(repo, name, str(listing.sha), each.size, _hash(each)) for name, each in named.items()}
    except (ValueError, RecursionError) as error:
        where = f"{constants.ENDPOINT} describes '{repo}' in a way that headgram does not understand"
        raise HeadgramError(f"{where} ({first_problem(error)})") from None
    if not listing.sha or not _COMMIT.fullmatch(listing.sha):
        raise HeadgramError(f"{constants.ENDPOINT} names no commit for '{repo}', so headgram cannot pin it: try again")
    location = RemoteLocation(repo, listing.sha, files)
    _ = location.weights  # refuse what cannot be read now, not in the middle of a job
    return location


def fetch_into(file: HubFile, start: int, buffer: memoryview, advance: Callable[[int], None] = lambda count: None) -> None:
    """Fill a buffer with the bytes of a file from `start` on.

    A lost connection is taken up again where it broke, after a pause; a busy server is waited for, see `answer`.

    Parameters
    ----------
    file
        The file.
    start
        First byte.
    buffer
        Where the bytes go; its length says how many.
    advance
        Told how many bytes have come, whenever some have.

    Raises
    ------
    HeadgramError
        If the server ignores ranges, the file is not what the hub described, or the connection stays broken.
    """
    done, failures = 0, 0
    while done < len(buffer):
        before = done
        try:
            wanted = f"bytes={start + done}-{start + len(buffer) - 1}"
            with answer(file.url, {"Range": wanted}) as response:
                _check_range(response, file, start + done)
                for chunk in chunks(response, str(file)):
                    if done + len(chunk) > len(buffer):
                        raise HeadgramError(
                            f"the server sends more of {file} than it was asked for: fetch the checkpoint with `hf download`"
                        )
                    buffer[done : done + len(chunk)] = chunk
                    done += len(chunk)
                    advance(len(chunk))
            reason = "the connection was closed early"
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
        except (HfHubHTTPError, OfflineModeIsEnabled) as error:
            raise HeadgramError(_refusal(error, file.repo, file.commit)) from None
        if done < len(buffer):
            failures = 1 if done > before else failures + 1
            if failures == ATTEMPTS:
                raise HeadgramError(
                    f"{file} cannot be read ({reason}, {failures} times in a row): run again when the network is back"
                )
            pause(failures)


def _check_range(response: httpx.Response, file: HubFile, first: int) -> None:
    """Refuse an answer that is not the asked part of the file that the hub described."""
    if response.status_code != httpx.codes.PARTIAL_CONTENT:
        raise HeadgramError(
            f"the server of {file} ignores byte ranges (it answers {response.status_code}), and headgram will not fetch "
            f"the whole file unasked: do so with `hf download {file.repo} --revision {file.commit}`"
        )
    if not response.headers.get("Content-Range", "").replace(" ", "").startswith(f"bytes{first}-"):
        raise HeadgramError(
            f"the server of {file} sends other bytes than it was asked for: fetch the checkpoint with `hf download`"
        )
    total = response.headers["Content-Range"].rpartition("/")[2].strip()
    etag = _etag_of(response)
    other_etag = etag is not None and len(etag) == len(file.etag) and etag != file.etag  # a tag of another kind says nothing
    if total not in ("*", str(file.size)) or other_etag:
        raise HeadgramError(
            f"{file} changed at the hub: it is not the file that commit {file.commit[:12]} describes; lock the model again"
        )


def _etag_of(response: httpx.Response) -> str | None:
    """The hub's hash of the file that is being sent; None if only another host speaks, whose tags are its own."""
    for each in (*response.history, response):
        if linked := each.headers.get("X-Linked-Etag"):
            return str(linked).removeprefix("W/").strip('"')
    tag = None if response.history else response.headers.get("ETag")
    return tag.removeprefix("W/").strip('"') if tag else None


def _hash(file: _Listed) -> str:
    hashed = file.lfs.sha256 if file.lfs else file.blobId
    if not hashed:
        raise ValueError(f"'{file.rfilename}' has no hash")
    return hashed


def _refusal(error: Exception, repo: str, revision: str | None) -> str:
    """Why the hub did not give what was asked for, and what to do about it."""
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    page = f"{constants.ENDPOINT}/{repo}"
    match error:
        case OfflineModeIsEnabled():
            return (
                f"'{repo}' must be read at the hub, but HF_HUB_OFFLINE is set: unset it, or `hf download {repo}` elsewhere first"
            )
        case GatedRepoError():
            return f"'{repo}' is gated: accept its licence at {page}, then log in with `hf auth login`"
        case RevisionNotFoundError():
            return f"'{repo}' has no revision '{revision}'"
        case RepositoryNotFoundError():
            return f"the hub has no model '{repo}', or it is private: check the name, or log in with `hf auth login`"
        case EntryNotFoundError():
            return f"'{repo}' lacks a file that its own listing names: try again"
    if status in (401, 403):
        return f"the hub refuses '{repo}' ({status}): log in with `hf auth login`, and accept the licence at {page} if asked to"
    if status == 416:
        return f"a file of '{repo}' is shorter than the hub's listing says: it changed; lock the model again"
    if status == 429:
        return f"the hub will not be asked for '{repo}' this often (429): wait some minutes, or log in with `hf auth login`"
    if status is not None:
        return f"the hub answers {status} for '{repo}': try again later"
    reason = next(iter(str(error).splitlines()), repr(error))
    return f"the hub cannot be reached at {constants.ENDPOINT} ({reason}): check the name, or run again when the network is back"
