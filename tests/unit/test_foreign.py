"""What strangers wrote is read within bounds, and printed harmlessly."""

import csv
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgram.atlas.display import console, show_models
from headgram.atlas.export import harmless
from headgram.errors import HeadgramError
from headgram.foreign import plain, read_bounded
from headgram.results.tables import MODELS

HOSTILE = {
    "colour": "\x1b[31mred",
    "clear screen": "\x1b[2J\x1b[H",
    "window title": "\x1b]0;owned\x07",
    "one byte for escape": "\x9b2J",
    "over the line": "good\rbad",
    "lines": "a\nheadgram: all is well",
    "backspaces": "a\x08\x08b",
    "reversed": "a\u202egpj.exe",
    "isolated": "\u2066a\u2069",
    "invisible": "a\u200b\u2060\ufeffb",
    "line separator": "a\u2028b",
    "a lone surrogate": "a\udcffb",
    "nothing": "a\0b",
    "markup": "[red]a[/red]",
    "markup that ends what is not open": "[/bold]",
    "a link": "[link=file:///etc/passwd]a[/link]",
    "emoji": ":skull:",
    "long": "x" * 10**6,
}
#: Of these, the ones that a table can hold: its texts are UTF-8.
HELD = {kind: text for kind, text in HOSTILE.items() if kind != "a lone surrogate"}
hostile = pytest.mark.parametrize("text", HELD.values(), ids=HELD.keys())


@given(st.text(st.characters(codec=None)) | st.sampled_from(list(HOSTILE.values())))
def test_whatever_is_printed_is_one_line_of_printable_characters(text):
    assert plain(text).isprintable()
    assert len(plain(text)) < 25_000
    assert plain(plain(text)) == plain(text) or len(plain(text)) > 2000
    if text.isprintable() and len(text) < 2000:
        assert plain(text) == text
    assert str(HeadgramError(f"it holds '{text}'")).isprintable()
    assert str(HeadgramError("These are wrong:", text, text)).count("\n") == 2


@hostile
def test_texts_of_a_table_are_shown_as_they_are(text):
    cells = {field.name: [text if field.type == pa.string() else 1] for field in MODELS}
    frame = pd.DataFrame({"model": [text], **cells})
    out = console()
    out.file = io.StringIO()
    show_models(SimpleNamespace(summary=lambda: frame), out)
    lines = out.file.getvalue().split("\n")
    assert all(line.isprintable() for line in lines)
    if len(text) < 100:
        assert plain(text)[:3] in "".join(lines)


@hostile
@pytest.mark.parametrize("start", ["", "=", "+", "-", "@"])
def test_no_cell_of_a_csv_file_is_a_formula(text, start):
    frame = pd.DataFrame({"model": [start + text, "gpt2"], "score": np.array([-1.5, 2.5]), "layer": [-1, 2]})
    rows = list(csv.reader(io.StringIO(harmless(frame).to_csv(index=False))))
    assert all(not cell.startswith(("=", "+", "-", "@")) and cell.isprintable() for cell, *_ in rows)
    assert [row[1:] for row in rows[1:]] == [["-1.5", "-1"], ["2.5", "2"]]
    assert rows[2][0] == "gpt2"


@pytest.mark.parametrize("argument", [b"\x1b[2J", b"[/bold]", b"a\xffb", b"~nobody/a", b"x" * 5000, "\u202ea".encode(), b"a\nb"])
@pytest.mark.parametrize("command", ["inspect", "show --results", "lock --manifest", "verify", "compare a b --results"])
def test_whatever_is_given_is_answered_by_one_sentence(argument, command, capsys, monkeypatch):
    from headgram.cli import main

    monkeypatch.setattr(sys, "argv", ["headgram", *command.split(), os.fsdecode(argument)])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 1
    assert said.err.startswith("headgram: ")
    assert all(line.isprintable() for line in (said.out + said.err).splitlines())
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "/dev/tty", "endless", "too large"])
def test_what_is_no_file_or_too_large_is_not_read(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("/dev"):
        path.symlink_to(kind)
    else:
        with path.open("wb") as file:
            file.truncate(2**40 if kind == "endless" else 2**20 + 1)
    with pytest.raises((OSError, ValueError)):
        read_bounded(path, 2**20)


def test_ctrl_c_leaves_no_traceback():
    code = "import os, signal, headgram.cli as c; c.app = lambda: os.kill(os.getpid(), signal.SIGINT); c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
