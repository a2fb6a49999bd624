"""What a command writes, where something goes wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sere_sglang.errors import SereError
from sere_sglang.files import one_writer, replace_file, write_output
from sere_sglang.measure.cells import Cells


def test_what_was_there_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "result.json"
    replace_file(path, "first")
    monkeypatch.setattr("os.fsync", _no_space)
    with pytest.raises(SereError, match=r"result\.json: cannot be written \(No space left"):
        write_output(path, "second")
    assert path.read_text() == "first" and [*path.parent.iterdir()] == [path]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to a pipe").symlink_to("pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "to a pipe"):
        with pytest.raises(SereError, match=r"cannot be written \(it is no regular file\)"):
            write_output(path, "x")
    assert (tmp_path / "pipe").is_fifo() and len([*tmp_path.iterdir()]) == 2
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    write_output(tmp_path / "link", "x")
    assert (tmp_path / "link").read_text() == "x"


def test_a_cell_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells.jsonl")
    cells.add({"batch": 4}, {"kl": 0.1})
    cells.path = Path("/proc/nowhere/cells.jsonl")
    with pytest.raises(SereError, match=r"cells\.jsonl: cannot be written"):
        cells.add({"batch": 8}, {"kl": 0.2})
    kept = Cells(tmp_path / "cells.jsonl")
    assert kept.get({"batch": 4}) == {"kl": 0.1} and kept.get({"batch": 8}) is None


@pytest.mark.parametrize("folder", [True, False])
def test_one_writer_at_a_time(tmp_path: Path, folder: bool) -> None:
    out = tmp_path if folder else tmp_path / "profile.safetensors"
    refused = pytest.raises(SereError, match=r"--out .*: another command writes there")
    with one_writer(out), refused, one_writer(out):
        pass
    with one_writer(out):
        pass
    assert not [*tmp_path.iterdir()]


def _no_space(_handle: int) -> None:
    raise OSError(28, "No space left on device")
