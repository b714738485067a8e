"""The texts of tokens, read as data from files of every kind."""

import json
import struct

import pytest

from headgram.checkpoints.known import open_checkpoint
from headgram.checkpoints.vocabulary import token_texts
from headgram.errors import HeadgramError
from tiny import write_llama, write_llama_gguf

TEXTS = ["<s>", "Ġthe", "cat", "ĠcafÃ©", "Ċ", "\x1b[2J"]
READ = ["<s>", " the", "cat", " café", "\n", "\x1b[2J"]


def sentencepiece(texts):
    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = (field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -1.5) + b"\x18\x01") for text in texts)
    return b"".join(pieces) + field(2, b"\x0a\x01x")


BLANKS = [text.replace(" ", "▁") for text in READ]
FILES = {
    "tokenizer.json": (
        json.dumps(
            {"model": {"vocab": dict(zip(TEXTS[1:], range(1, 6), strict=True))}, "added_tokens": [{"id": 0, "content": "<s>"}]}
        ),
        READ,
    ),
    "tokenizer.json of scores": (json.dumps({"model": {"vocab": [[text, -1.0] for text in BLANKS]}}), READ),
    "vocab.json": (json.dumps(dict(zip(TEXTS, range(6), strict=True))), READ),
    "vocab.txt": ("\n".join(["<s>", "the", "##cat"]), ["<s>", "the", "##cat"]),
    "tokenizer.model": (sentencepiece(BLANKS), READ),
}


@pytest.mark.parametrize("name", FILES)
def test_texts_are_read_from_every_format(tmp_path, name):
    content, expected = FILES[name]
    folder = write_llama(tmp_path / "llama", layers=1)
    (folder / name.split(" of ")[0]).write_bytes(content if isinstance(content, bytes) else content.encode())
    with open_checkpoint(folder) as checkpoint:
        assert token_texts(checkpoint.location) == dict(enumerate(expected))


def tokenizers_of_each_kind():
    """Libraries' own tokenizers, trained on a few words of several scripts, one of which looks like GPT-2's letters for bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = ["Ġublesija Ġdid café über ▁ ▁a", "Ġdid café nàixer", "über naïve a\u2028b"] * 20
    special = {"special_tokens": ["<s>", "[UNK]", "Ġ▁é"]}
    for kind, model, trainer in (
        ("word pieces", models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=90, **special)),
        ("words", models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(vocab_size=90, **special)),
        ("bytes", models.BPE(), trainers.BpeTrainer(vocab_size=330, **special)),
        ("bytes without blanks", models.BPE(end_of_word_suffix="</w>"), trainers.BpeTrainer(vocab_size=330, **special)),
        ("pieces", models.Unigram(), trainers.UnigramTrainer(vocab_size=60, unk_token="[UNK]", **special)),
    ):
        found = Tokenizer(model)
        found.pre_tokenizer = {"bytes": pre_tokenizers.ByteLevel(), "pieces": pre_tokenizers.Metaspace()}.get(
            kind, pre_tokenizers.WhitespaceSplit()
        )
        if kind == "bytes without blanks":
            found.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        found.decoder = decoders.ByteLevel() if kind.startswith("bytes") else decoders.Fuse()
        found.train_from_iterator(words, trainer)
        yield pytest.param(found, id=kind)


@pytest.mark.parametrize("tokenizer", tokenizers_of_each_kind())
def test_texts_are_those_of_the_library(tmp_path, tokenizer):
    """Words of people whose letters elsewhere stand for bytes or blanks stay as they are."""
    folder = write_llama(tmp_path / "llama", layers=1)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    with open_checkpoint(folder) as checkpoint:
        found = token_texts(checkpoint.location)
    assert found.keys() == set(tokenizer.get_vocab().values())
    is_pieces = type(tokenizer.model).__name__ == "Unigram"
    for number, text in found.items():
        token = tokenizer.id_to_token(number)
        if number in added:
            assert text == token
        elif is_pieces:
            assert text == token.replace("▁", " ")
        else:
            assert text == tokenizer.decoder.decode([token])


def test_a_line_of_a_vocabulary_ends_at_a_line_feed_alone(tmp_path):
    """As transformers reads it: some vocabularies hold other signs at which Python would begin a line."""
    folder = write_llama(tmp_path / "llama", layers=1)
    lines = ["[PAD]", "a", "\x85", "\u2028", "\x0b", "##b"]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with open_checkpoint(folder) as checkpoint:
        assert token_texts(checkpoint.location) == dict(enumerate(lines))


@pytest.mark.parametrize(
    ("model_type", "file", "shift"),
    [
        ("xlm-roberta", "sentencepiece.bpe.model", 1),
        ("camembert", "sentencepiece.bpe.model", 4),
        ("pegasus", "spiece.model", 103),
    ],
)
def test_numbers_are_the_models_where_its_own_tokens_come_before_those_of_the_file(tmp_path, model_type, file, shift):
    pieces = ["<unk>", "<s>", "</s>", "▁the", "cat"]
    location = open_checkpoint(folder := write_llama(tmp_path / "llama", layers=1)).location
    (folder / file).write_bytes(sentencepiece(pieces))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    assert token_texts(location) == {3 + shift: " the", 4 + shift: "cat"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    assert token_texts(location) == ({} if file == "sentencepiece.bpe.model" else dict(enumerate([*pieces[:3], " the", "cat"])))


@pytest.mark.parametrize("times", [1, 1000])
def test_texts_are_read_from_a_gguf_file_however_long(tmp_path, times):
    write_llama_gguf(tmp_path / "model.gguf", layers=1, metadata={"tokenizer.ggml.tokens": TEXTS * times})
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        assert token_texts(checkpoint.location) == dict(enumerate(READ * times))


def test_without_a_tokenizer_there_are_no_texts(tmp_path):
    with open_checkpoint(write_llama(tmp_path / "llama", layers=1)) as checkpoint:
        assert token_texts(checkpoint.location) == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": [1]}}}'),
        ("tokenizer.json", b'{"model": {"vocab": [1]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": 5}]}'),
        ("tokenizer.json", b'{"model": {"vocab": {"\\ud800": 0}}}'),
        ("vocab.json", b'{"a": 1e9}'),
        ("vocab.txt", b"\xff"),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\x0f"),
        ("tokenizer.model", b"\x0a"),
        ("tokenizer.model", b"\x0b"),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path, name, content):
    folder = write_llama(tmp_path / "llama", layers=1)
    (folder / name).write_bytes(content)
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(HeadgramError, match=f"{name} is no tokenizer's file that headgram reads"),
    ):
        token_texts(checkpoint.location)


def test_a_tokenizer_that_is_a_link_out_of_the_checkpoint_is_refused(tmp_path):
    (tmp_path / "secret").write_text("a line that is nobody's business")
    folder = write_llama(tmp_path / "llama", layers=1)
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with open_checkpoint(folder) as checkpoint, pytest.raises(HeadgramError, match="'vocab.txt' leads out of"):
        token_texts(checkpoint.location)
