"""A job of an earlier run publishes nothing once a newer one has begun."""

import pytest

from headgram.errors import HeadgramError
from headgram.results.asked import Order, ask_for, asked_for, check_asked_for, working_for
from headgram.results.files import write_text, written_whole

RECORD = "models/m/self/eigen/layers-000-001.json"


def publish(folder, key, text):
    with working_for(Order(folder, RECORD, key)):
        write_text(folder / "table", text)


def test_only_what_the_latest_run_asks_for_is_published(tmp_path):
    publish(tmp_path, "old", "no run began here")
    ask_for(tmp_path, {RECORD: "old"})
    publish(tmp_path, "old", "old")
    ask_for(tmp_path, {RECORD: "new"})
    publish(tmp_path, "new", "new")
    with pytest.raises(HeadgramError, match="no longer asks for"):
        publish(tmp_path, "old", "old")
    assert (tmp_path / "table").read_text() == "new"
    ask_for(tmp_path, {})
    with pytest.raises(HeadgramError, match="no longer asks for"):
        publish(tmp_path, "new", "of a cut that is no more")
    with pytest.raises(HeadgramError, match="no longer asks for"):
        check_asked_for(tmp_path, RECORD, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".plan.json", "table"]


def test_a_run_that_begins_while_a_job_writes(tmp_path):
    ask_for(tmp_path, {RECORD: "old"})
    write_text(tmp_path / "table", "new")
    with pytest.raises(HeadgramError, match="no longer asks for"):
        overtaken(tmp_path)
    assert (tmp_path / "table").read_text() == "new"


def overtaken(folder):
    with working_for(Order(folder, RECORD, "old")), written_whole(folder / "table") as file:
        file.write(b"old")
        ask_for(folder, {RECORD: "new"})


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5])
def test_a_damaged_plan_is_none(tmp_path, text):
    ask_for(tmp_path, {})
    (tmp_path / ".plan.json").write_text(text)
    assert asked_for(tmp_path) is None


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / ".plan.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        ask_for(tmp_path, {RECORD: "new"})
    assert asked_for(tmp_path) is None
    assert (tmp_path / "elsewhere").read_text() == "kept"
