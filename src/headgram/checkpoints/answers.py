"""Answers of a hub: waited for, but not for ever, and read within bounds."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping

from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

from headgram.errors import HeadgramError

#: How often in a row a request may fail, and the longest pause between two attempts.
ATTEMPTS = 6
_LONGEST_PAUSE = 8.0
#: What means "ask again", and the longest that a hub may have us wait before.
_BUSY = (429, 500, 502, 503, 504)
_LONGEST_WAIT = 300.0
#: Seconds in which a body must bring this many bytes, or end.
_WINDOW = 60.0
_LEAST_BYTES = 64 * 2**10


def pause(failures: int) -> None:
    """Wait before the next attempt, the longer the more have failed."""
    time.sleep(min(2.0 ** (failures - 1), _LONGEST_PAUSE))


@contextlib.contextmanager
def answer(
    url: str, headers: Mapping[str, str] | None = None, params: Mapping[str, bool] | None = None
) -> Iterator[httpx.Response]:
    """The answer to a GET request, whose body is not read yet. A busy hub is asked again when it says, if that is soon.

    Raises
    ------
    huggingface_hub.errors.HfHubHTTPError
        If the hub refuses.
    httpx.RequestError
        If it cannot be reached.
    """
    given = {**build_hf_headers(), "Accept-Encoding": "identity", **(headers or {})}
    for attempt in range(1, ATTEMPTS + 1):
        wait = None
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=given, params=params, timeout=timeout) as response:
            if response.status_code in _BUSY and attempt < ATTEMPTS:
                wait = _wait_of(response)
            if wait is None or wait > _LONGEST_WAIT:
                # Without its body, which nobody bounds where an error is described.
                bare = {name: value for name, value in response.headers.items() if not name.lower().startswith("content-")}
                hf_raise_for_status(httpx.Response(response.status_code, headers=bare, request=response.request))
                yield response
                return
        time.sleep(wait) if wait else pause(attempt)


def _wait_of(response: httpx.Response) -> float:
    """Seconds after which the hub wants to be asked again; 0 where it does not say."""
    said = [re.fullmatch(r"\d{1,9}", response.headers.get("Retry-After", "").strip())]
    said += [re.search(r"\bt=\"?(\d{1,9})", response.headers.get("RateLimit", ""))]
    return max((float(match[match.lastindex or 0]) for match in said if match), default=0.0)


def chunks(response: httpx.Response, where: str) -> Iterator[bytes]:
    """A body as it comes.

    Raises
    ------
    HeadgramError
        If it is compressed, which nobody asked for, or so slow that it will not end.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HeadgramError(
            f"the server of {where} compresses what it was asked to send as it is: fetch the checkpoint with `hf download`"
        )
    began, come = time.monotonic(), 0
    for chunk in response.iter_raw():
        yield chunk
        come += len(chunk)
        if time.monotonic() - began > _WINDOW:
            if come < _LEAST_BYTES:
                raise HeadgramError(f"the server of {where} sends less than a kilobyte a second: run again when it is faster")
            began, come = time.monotonic(), 0


def fetch(url: str, most: int, where: str, params: Mapping[str, bool] | None = None) -> bytes:
    """The whole body of an answer; a connection that is lost on the way is tried again.

    Raises
    ------
    HeadgramError
        If it has more than `most` bytes, or `chunks` refuses it.
    """
    for attempt in range(1, ATTEMPTS + 1):
        content = bytearray()
        try:
            with answer(url, params=params) as response:
                for chunk in chunks(response, where):
                    content += chunk
                    if len(content) > most:
                        raise HeadgramError(
                            f"the hub sends more of {where} than the {most:,} bytes that it should have: try again"
                        )
            return bytes(content)
        except (httpx.ReadError, httpx.RemoteProtocolError):
            if attempt == ATTEMPTS:
                raise
        pause(attempt)
    raise AssertionError("the last attempt returns or raises")
