"""The results file: appended to, never rewritten, never mixed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from relay_benchmarks.drafting import DRAFTING_COLUMNS
from relay_benchmarks.errors import ResultsFileError
from relay_benchmarks.refining import REFINING_COLUMNS
from relay_benchmarks.results_file import DECODE_COLUMNS, RESULTS_FOLDER, ResultsFile
from relay_benchmarks.segmentation import SEGMENTATION_COLUMNS
from relay_benchmarks.serve import SERVE_COLUMNS
from relay_benchmarks.throughput import THROUGHPUT_COLUMNS

COLUMNS = ("time", "side", "ms")
ROW = {"time": "now", "side": "stock", "ms": 1.5}
COLUMNS_OF_FILE = {
    "drafting.csv": DRAFTING_COLUMNS,
    "refining.csv": REFINING_COLUMNS,
    "segmentation.csv": SEGMENTATION_COLUMNS,
    "serve.csv": SERVE_COLUMNS,
    "throughput.csv": THROUGHPUT_COLUMNS,
}
# every other is named by a machine, and written by `bench decode`


def test_a_new_file_gets_a_header_and_then_rows(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "deeper" / "machine.csv", COLUMNS)
    file.prepare()
    file.append([ROW])
    file.prepare()
    file.append([{**ROW, "side": 'relay, "ours"'}])
    with file.path.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["side"] for row in rows] == ["stock", 'relay, "ours"']
    assert rows[0] == {"time": "now", "side": "stock", "ms": "1.5"}


def test_what_is_there_stays_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "machine.csv"
    before = "time,side,ms\nold,stock,9\n"
    path.write_text(before)
    file = ResultsFile(path, COLUMNS)
    file.prepare()
    file.append([ROW])
    assert path.read_text() == before + "now,stock,1.5\n"


@pytest.mark.parametrize("header", ["time,side", "time,side,seconds", "side,time,ms", "time,side,ms,extra"])
def test_other_columns_are_refused_and_left_alone(tmp_path: Path, header: str) -> None:
    path = tmp_path / "machine.csv"
    path.write_text(header + "\n")
    with pytest.raises(ResultsFileError, match="--output"):
        ResultsFile(path, COLUMNS).prepare()
    assert path.read_text() == header + "\n"


def test_half_a_row_at_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.csv"
    path.write_text("time,side,ms\nnow,sto")
    with pytest.raises(ResultsFileError, match="half a row"):
        ResultsFile(path, COLUMNS).prepare()


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "machine.csv", tmp_path):
        with pytest.raises(ResultsFileError, match="cannot append") as caught:
            ResultsFile(path, COLUMNS).prepare()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [{"time": "now"}, {**ROW, "extra": 1}])
def test_a_row_must_fill_the_columns(tmp_path: Path, row: dict[str, object]) -> None:
    file = ResultsFile(tmp_path / "machine.csv", COLUMNS)
    file.prepare()
    with pytest.raises(ValueError, match="differ"):
        file.append([row])


def test_every_column_is_explained_and_no_other() -> None:
    text = (RESULTS_FOLDER / "README.md").read_text()
    first_cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    explained = [name.strip(" `") for cell in first_cells for name in cell.split(",")]
    assert sorted(explained) == sorted(DECODE_COLUMNS)


def test_kept_results_have_todays_columns() -> None:
    for path in RESULTS_FOLDER.glob("*.csv"):
        ResultsFile(path, COLUMNS_OF_FILE.get(path.name, DECODE_COLUMNS)).prepare()
