"""`headgram verify` finds whatever was touched."""

import random

import pyarrow.parquet as pq


def test_a_finished_run_is_whole(finished):
    done = finished.headgram("verify")
    assert done.returncode == 0, done.stderr
    assert "all as they were written" in done.stdout


def test_a_flipped_byte_in_any_file_is_found(finished, tmp_path):
    from headgram.verify import verify

    results = finished.copy(tmp_path / "project").folder / "results"
    chance = random.Random(0)
    files = [path for part in ("atlas", "models", "seed", "provenance") for path in (results / part).rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        data = path.read_bytes()
        position = chance.randrange(len(data))
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << chance.randrange(8))]) + data[position + 1 :])
        assert any(path.name in problem for problem in verify(results)[1]), path
        path.write_bytes(data)
    assert verify(results)[1] == []


def test_missing_and_foreign_files_are_named(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    results = project.folder / "results"
    (results / "seed" / "tiny-bert.json").unlink()
    (results / "atlas" / "heads" / "model=tiny-bert" / "extra.parquet").write_bytes(b"")
    done = project.headgram("verify", "results")
    assert done.returncode == 1
    assert "tiny-bert.json cannot be read" in done.stderr
    assert "extra.parquet belongs to no finished artifact" in done.stderr


def test_tables_that_contradict_each_other_are_named(finished, tmp_path):
    from headgram.verify import _identity_problems

    folder = finished.copy(tmp_path / "project").folder / "results" / "atlas"
    files = {name: folder / name / "model=tiny-llama" / f"{name}.parquet" for name in ("heads", "spectra", "gram")}
    assert list(_identity_problems(files)) == []
    table = pq.read_table(files["heads"].open("rb"))
    changed = table.set_column(
        table.schema.get_field_index("fro_sq"), table.schema.field("fro_sq"), [table["fro_sq"].to_numpy() * 1.01]
    )
    pq.write_table(changed, files["heads"])
    assert [problem.split(" fails")[0] for problem in _identity_problems(files)] == [
        "sum(s²) = fro_sq",
        "sum(λ²) = (fro_sq + self_overlap) / 2",
        "gram[a, a] = fro_sq",
    ]


def test_derived_tables_that_contradict_the_merged_ones_are_named(finished, tmp_path):
    from headgram.verify import _derived_problems

    folder = finished.copy(tmp_path / "project").folder / "results" / "atlas"
    files = {name: folder / name / "model=tiny-llama" / f"{name}.parquet" for name in ("overlap", "layers", "models")}
    assert list(_derived_problems(files)) == []
    for name, column in (("layers", "trace_q25"), ("models", "directionality_median"), ("overlap", "signed")):
        table = pq.read_table(files[name].open("rb"))
        place = table.schema.get_field_index(column)
        pq.write_table(table.set_column(place, table.schema.field(place), [table[column].to_numpy() + 2]), files[name])
    assert [problem.split(" fails")[0] for problem in _derived_problems(files)] == [
        "trace_q25",
        "directionality_median of the model",
        "an overlap of signed directions lies outside [0, 1]",
    ]


def test_nothing_to_verify(project):
    done = project.headgram("verify")
    assert done.returncode == 1
    assert "no artifact to verify" in done.stderr
