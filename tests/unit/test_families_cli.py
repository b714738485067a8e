"""`headgram prove` and `headgram adopt`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from headgram.cli import app
from headgram.errors import HeadgramError
from headgram.families import layouts
from headgram.proofs.shrink import model_classes, quiet, tiny_model

RUN = CliRunner()


def test_prove_prints_a_table() -> None:
    result = RUN.invoke(app, ["prove", "gpt2", "t5"])
    assert result.exit_code == 0
    assert "gpt2" in result.stdout
    assert "cross" in result.stdout


def test_prove_prints_markdown() -> None:
    header, rule, row = RUN.invoke(app, ["prove", "--markdown", "gpt2"]).stdout.splitlines()
    assert header.startswith("| model type | family | layout |")
    assert set(rule) <= set("| -")
    assert row.startswith("| gpt2 | gpt2 | column_blocks | self | 4/4×12, ")
    assert "| query, key, value, output | all |" in row
    assert row.endswith("| yes |")


def test_prove_fails_if_a_proof_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layouts.LAYOUTS, "interleaved", layouts.LAYOUTS["blocks"])
    result = RUN.invoke(app, ["prove", "--markdown", "gpt2", "gpt_neox"])
    assert result.exit_code == 1
    assert "headgram: gpt_neox: the scores differ by" in result.stderr
    assert [line.split()[-2] for line in result.stdout.splitlines()[2:]] == ["yes", "no"]


def test_inspect_says_what_a_reader_of_a_role_must_know(tmp_path: Path) -> None:
    """Positions that attention modules add, and values of another stream."""
    model_class, *_ = model_classes("detr")
    with quiet():
        tiny_model("detr", model_class, 0).save_pretrained(tmp_path)
    shown = RUN.invoke(app, ["inspect", str(tmp_path)]).output
    for said in (
        "encoder: queries and keys read the tokens and what stands for their places",
        "cross: values read the encoder's",
    ):
        assert said in " ".join(shown.split())


def test_adopt_finds_the_layouts_that_fit() -> None:
    result = RUN.invoke(app, ["adopt", "minimax_m2"])
    assert result.exit_code == 0
    assert "'minimax_m2' has the layout of 'mixtral' (largest residual" in result.stdout


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("mamba", "no known layout is proven for 'mamba'"),  # it has no attention
        ("gpt-sw3", "no known layout is proven for 'gpt-sw3'"),  # saved under the name of GPT-2
        ("no_such_type", "the installed transformers does not know the model type 'no_such_type'"),
    ],
)
def test_adopt_never_guesses(model_type: str, sentence: str) -> None:
    result = RUN.invoke(app, ["adopt", model_type])
    assert isinstance(result.exception, HeadgramError)
    assert str(result.exception).startswith(sentence)
