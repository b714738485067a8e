"""What objects say of themselves, and what `headgram doctor` says of the machine."""

import re
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, metadata

import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

import headgram
from headgram.atlas.compare import Comparison
from headgram.cli import app
from headgram.run import doctor
from headgram.version import __version__
from tiny import write_llama


def test_a_checkpoint_and_its_stacks(tmp_path):
    with headgram.open_checkpoint(write_llama(tmp_path / "<b>llama", layers=3)) as checkpoint:
        text = repr(checkpoint)
        assert text.splitlines()[0] == f"Checkpoint of llama (safetensors) in {tmp_path}/<b>llama"
        assert re.search(r"stack +layers +heads +key heads +rank +width +stored as", text)
        assert re.search(r"self +0–2 +4 +2 +8 +32 +F32", text)
        assert repr(checkpoint.stacks[0]).startswith("Stack 'self': 3 layers of 4 heads\n")
        shown = checkpoint._repr_html_()
        assert "<td>0–2</td>" in shown
        assert "<b>llama" not in shown
        assert "&lt;b&gt;llama" in shown


def test_an_atlas_that_cannot_be_read_says_so(tmp_path):
    (tmp_path / "provenance").mkdir()
    for i in range(25):
        (tmp_path / "provenance" / f"m{i:02d}.json").write_text("{}")
    text = repr(headgram.open_atlas(tmp_path))
    assert text.startswith(f"Atlas of 25 models in {tmp_path}: ")
    assert "cannot be read" in text
    assert text.splitlines()[-2:] == ["  m19", "  … and 5 more"]


def test_results_say_shape_and_meaning():
    weights = torch.randn(4, 8, 32)
    found = headgram.spectrum(weights, weights[:2], topk=3)
    text = repr(found)
    assert text.splitlines()[0] == "Spectrum of 4 heads: rank 8, width 32, 3 directions kept"
    assert re.search(r"\bright +\(4, 3, 32\) +top directions on the query side", text)
    assert re.search(r"\bsymmetric_eigenvalues +\(4, 16\) +eigenvalues of the symmetric part", text)
    for field in fields(found):
        assert f"<td>{field.name}</td>" in found._repr_html_()
    assert "tensor" not in text

    rows = pd.DataFrame({"layer": range(12)})
    compared = Comparison("step0", "step9", rows, rows[:0], rows[:5], None)
    text = repr(compared)
    assert text.splitlines()[0] == "Comparison of step9 (after) with step0 (before)"
    assert re.search(r"heads +12 +how far every head moved", text)
    assert re.search(r"matches +5 ", text)
    assert "<td>12</td>" in compared._repr_html_()


def test_the_doctor_names_what_is_missing_and_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    whole = CliRunner().invoke(app, ["doctor"])
    assert max(len(line) for line in whole.output.splitlines() if "/" not in line) <= 80  # a path is not cut
    assert whole.exit_code == 0, whole.output
    assert f"headgram {__version__}" in whole.output

    def nothing(name: str) -> str:
        if name != "snakemake":
            raise PackageNotFoundError(name)
        return "9"

    monkeypatch.setattr(doctor, "version", nothing)
    extras = metadata("headgram").get_all("Provides-Extra")
    advised = re.findall(r"pip install 'headgram\[(\w+)\]'", CliRunner().invoke(app, ["doctor"]).output)
    assert {"quantised", "prove", "s3"} <= set(advised) <= set(extras)

    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text("no option: 1\n")
    wrong = CliRunner().invoke(app, ["doctor"])
    assert isinstance(wrong.exception, headgram.HeadgramError)
    assert re.search(r"^wrong .*unknown key 'no option'", wrong.output, re.MULTILINE)


def test_the_citation_has_this_version():
    from pathlib import Path

    citation = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "MIT"


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased"])
def test_a_bare_name_is_told_from_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(headgram.HeadgramError, match="ORGANISATION/NAME"):
        headgram.open_checkpoint(name)
