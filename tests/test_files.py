"""Files and folders appear whole or not at all."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.files import (
    own_name,
    read_json,
    read_jsonl,
    sha256_file,
    whole_file,
    whole_folder,
    write_json,
    write_jsonl,
)

LINE_ENDS = "\n\r\v\f\x1c\x85\u2028\u2029"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_and_raise(path: Path, error: type[BaseException]) -> None:
    path.write_text("half")
    raise error


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "out") as partial:
        (partial / "file").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "file").read_text() == "new"


def test_a_folder_takes_the_whole_place_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with whole_folder(tmp_path / "out") as partial:
        (partial / "new").touch()
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_leaves_the_folder_before_alone(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(error), whole_folder(tmp_path / "out") as partial:
        write_and_raise(partial / "new", error)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_what_a_killed_process_left_of_a_folder_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from pipeline.files import whole_folder\n"
        "with whole_folder(Path('out')) as partial:\n"
        "    (partial / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("half")] == ["half"]
    with whole_folder(tmp_path / "out") as partial:
        (partial / "whole").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["whole"]


def test_a_file_appears_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert (path.read_text(), names(path.parent)) == ("new", ["file"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_file_before_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as partial:
        write_and_raise(partial, error)
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_what_a_killed_process_left_of_a_file_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_text("half of what was to be written, and long")
    with whole_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert ((tmp_path / "file").read_text(), names(tmp_path)) == ("whole", ["file"])


@given(json_values)
def test_json_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_bytes().endswith(b"\n")


def test_locations_of_one_name_have_names_of_their_own() -> None:
    names = [own_name(location) for location in ("s3://a/texts", "s3://a/texts/", "s3://b/texts", "/data/texts")]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert all(re.fullmatch("texts-[0-9a-f]{8}", name) for name in names)
    assert own_name("s3://bucket/").startswith("bucket-")


def test_a_part_becomes_json_when_it_is_written(tmp_path: Path) -> None:
    sizes: list[int] = []

    def to_json(part: object) -> list[str]:
        assert isinstance(part, bytes)
        # What is in the file already; the rest waits in its buffer.
        sizes.append((tmp_path / "value.json.partial").stat().st_size)
        return [part.decode()]

    write_json(tmp_path / "value.json", {str(number): b"x" * 10_000 for number in range(9)}, to_json)
    assert read_json(tmp_path / "value.json") == {str(number): ["x" * 10_000] for number in range(9)}
    assert sizes[0] == 0 < sizes[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_numbers_that_it_cannot_hold(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "value.json", {"loss": [value]})
    with pytest.raises(ValueError, match="Out of range float"):
        write_jsonl(tmp_path / "values.jsonl", [{"loss": value}])
    assert names(tmp_path) == []


@given(st.lists(st.dictionaries(st.text(), st.text() | st.sampled_from(list(LINE_ENDS)) | json_values, max_size=3)))
def test_json_lines_read_back_whatever_their_texts_hold(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    write_jsonl(path, rows)
    assert list(read_jsonl(path)) == rows
    assert path.read_bytes().count(b"\n") == len(rows)


def test_line_ends_of_any_kind_stay_in_their_row(tmp_path: Path) -> None:
    rows = [{"text": f"a{LINE_ENDS}b"}, {"text": "c\r\nd"}]
    write_jsonl(tmp_path / "rows.jsonl", iter(rows))
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == rows


def test_rows_that_fail_midway_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": object()}])
    assert names(tmp_path) == []


def test_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
