"""The texts of a checkpoint's tokens, read as data: from the GGUF file itself, or from a tokenizer's file beside the weights.

Nothing of a tokenizer is run. Where none of its files is there, tokens have their numbers alone.
"""

from __future__ import annotations

import io
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from headgram.checkpoints.bases import AdaptedLocation, AnyLocation
from headgram.checkpoints.gguf_store import strings_of
from headgram.checkpoints.sources import Location
from headgram.errors import HeadgramError
from headgram.foreign import parse_json, read_bounded

#: The largest file of a tokenizer that is read; real ones take up to about 40 MiB.
_LARGEST = 128 * 2**20
#: The most tokens that are numbered; real vocabularies have up to about 300,000.
_MOST = 2**21
#: Values in a tokenizer's file: tokens, and pairs that are merged.
_MOST_VALUES = 8 * _MOST
#: What marks a blank at the beginning of a word in SentencePiece.
_BLANK = "\u2581"
#: Models of these types have tokens of their own before those of their SentencePiece file. So many are added to a piece's number.
_SHIFTS = {"camembert": 4, "pegasus": 103, "bigbird_pegasus": 103} | dict.fromkeys(
    ("m2m_100", "mbart", "nllb-moe", "xglm", "xlm-roberta", "xlm-roberta-xl"), 1
)
#: Pieces of a file that stand for no text; such models have numbers of their own for them.
_CONTROLS = 3
#: The file of types whose tokens are shifted. Of a type with this file that is not listed above, no token's number is known.
_SHIFTED = "sentencepiece.bpe.model"


def token_texts(location: AnyLocation) -> dict[int, str]:
    """The text of every token, by its number; of an adapter, those of its base. Empty if no tokenizer lies beside the weights.

    Raises
    ------
    HeadgramError
        If a tokenizer's file is damaged.
    """
    if isinstance(location, AdaptedLocation):
        location = location.underneath
    if not isinstance(location, Location):
        return {}
    if location.format == "gguf":
        found = strings_of(location.path(location.weights[0]), "tokenizer.ggml.tokens")
        return _decoded(dict(enumerate(found)))
    for name, read in _READERS.items():
        if (location.folder / name).exists():
            path = location.path(name)
            try:
                texts = read(read_bounded(path, _LARGEST))
                if read is _sentencepiece:
                    texts = _shifted(texts, (location.config() or {}).get("model_type"), name)
                "".join(texts.values()).encode()  # no table holds anything but text, nor half of a pair of surrogates
                return texts
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error, RecursionError) as error:
                raise HeadgramError(
                    f"{path} is no tokenizer's file that headgram reads ({error}): fetch it again, or remove it"
                ) from None
    return {}


def common_tokens(a: Mapping[int, str], b: Mapping[int, str]) -> list[tuple[int, int]]:
    """The numbers in two vocabularies of every token that both write alike; texts that one of them holds twice are left out.

    Examples
    --------
    >>> common_tokens({0: " the", 1: "cat", 2: "cat"}, {0: "cat", 7: " the"})
    [(0, 7)]
    """
    there = _held_once(b)
    return [(number, there[text]) for text, number in _held_once(a).items() if text in there]


def _held_once(vocabulary: Mapping[int, str]) -> dict[str, int]:
    """The numbers of the texts that a vocabulary holds once."""
    counts = Counter(vocabulary.values())
    return {text: number for number, text in vocabulary.items() if text and counts[text] == 1}


def _tokenizer_json(content: bytes) -> dict[int, str]:
    """The format of the library `tokenizers`: a map, or a list of texts and scores."""
    whole = parse_json(content, _MOST_VALUES)
    vocabulary = whole["model"]["vocab"]
    texts = _numbered(vocabulary) if isinstance(vocabulary, Mapping) else {i: str(text) for i, (text, _) in enumerate(vocabulary)}
    if '"ByteLevel"' in json.dumps([whole.get("pre_tokenizer"), whole.get("decoder")]):
        texts = {number: _of_bytes(text) for number, text in texts.items()}
    elif whole["model"].get("type") not in ("WordPiece", "WordLevel"):  # these have no marks
        texts = _decoded(texts)
    return texts | _numbered({each["content"]: each["id"] for each in whole.get("added_tokens") or []})


def _vocab_json(content: bytes) -> dict[int, str]:
    """The map of GPT-2's format."""
    return _decoded(_numbered(parse_json(content, _MOST_VALUES)))


def _vocab_txt(content: bytes) -> dict[int, str]:
    """A token a line, as of BERT; other signs at which Python begins a line are tokens."""
    return {i: line.rstrip("\n") for i, line in enumerate(io.TextIOWrapper(io.BytesIO(content), "utf-8"))}


def _sentencepiece(content: bytes) -> dict[int, str]:
    """The texts of a SentencePiece model: fields 1 of the messages that are its fields 1."""
    pieces = (piece for number, piece in _fields(content) if number == 1)
    texts = (next((value for number, value in _fields(piece) if number == 1), b"") for piece in pieces)
    return _decoded({i: text.decode() for i, text in enumerate(texts)})


def _shifted(texts: dict[int, str], model_type: Any, file: str) -> dict[int, str]:
    """Texts by the model's numbers, given those by the numbers of pieces in its SentencePiece file."""
    shift = _SHIFTS.get(model_type) if isinstance(model_type, str) else None
    if shift is None:
        return {} if file == _SHIFTED else texts
    return {number + shift: text for number, text in texts.items() if number >= _CONTROLS}


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message of protocol buffers that hold bytes; numbers are passed over."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("a field reaches beyond the end of the file")
            yield tag >> 3, message[at : at + size]
            at += size
        else:
            raise ValueError(f"a field has the unknown type {kind}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for i in range(10):
        byte = message[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at + i + 1
    raise ValueError("a number has more than ten bytes")


def _numbered(vocabulary: Mapping[str, Any]) -> dict[int, str]:
    """A map from texts to numbers, turned round."""
    found = {number: text for text, number in vocabulary.items()}
    for number in found:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _MOST:
            raise ValueError(f"a token has the number {number!r:.60}")
    return found


def _decoded(texts: dict[int, str]) -> dict[int, str]:
    """Texts as they are read: SentencePiece's mark of a blank, and the letters that stand for bytes in GPT-2's format, undone."""
    if any(text.startswith(_BLANK) for text in texts.values()):
        return {number: text.replace(_BLANK, " ") for number, text in texts.items()}
    if not any(text.startswith("\u0120") for text in texts.values()):  # how that format writes a blank
        return texts
    return {number: _of_bytes(text) for number, text in texts.items()}


def _of_bytes(text: str) -> str:
    """A text whose letters each stand for a byte; as it is if one does not."""
    try:
        return bytes(_byte_letters()[letter] for letter in text).decode(errors="replace")
    except KeyError:
        return text


@cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters: printable bytes stand for themselves, all others for letters from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


#: By name, the files of a tokenizer, and how each is read; the first that is there is taken.
_READERS: dict[str, Callable[[bytes], dict[int, str]]] = {
    "tokenizer.json": _tokenizer_json,
    "vocab.json": _vocab_json,
    "vocab.txt": _vocab_txt,
    "tokenizer.model": _sentencepiece,
    "spiece.model": _sentencepiece,
    _SHIFTED: _sentencepiece,
}
