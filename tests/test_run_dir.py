"""Where a run lives, and how files appear there."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from phased_cpt.run_dir import new_run_folder, publish_file, run_folders


def test_the_folder_of_a_run_has_its_name_and_its_time(tmp_path: Path) -> None:
    folder = new_run_folder(tmp_path, "tales", datetime(2026, 11, 20, 9, 5, 7, tzinfo=UTC))
    assert folder == tmp_path / "tales-20261120_090507"


def test_the_folders_of_a_name_come_newest_first_and_of_no_other_name(tmp_path: Path) -> None:
    for name in ("a-20260101_000000", "a-20260102_000000", "a-b-20260103_000000", "axb-20260104_000000", "a-2026", "a"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "a-20260101_000000", (2e9, 2e9))  # the clock of a copy says nothing
    assert [path.name for path in run_folders(tmp_path, "a")] == ["a-20260102_000000", "a-20260101_000000"]
    assert [path.name for path in run_folders(tmp_path, "a.b")] == []
    assert run_folders(tmp_path / "nowhere", "a") == []


def test_a_published_file_is_replaced_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    publish_file(path, b"old")
    publish_file(path, b"new " * 10**6)
    assert path.read_bytes() == b"new " * 10**6
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_renamed_is_made_to_last_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is on disk before the name is, and the name before the call returns."""
    done: list[str] = []
    names: dict[int, str] = {}
    real_open, real_fsync, real_replace = os.open, os.fsync, os.replace

    def opened(path: os.PathLike[str], *rest: int, **more: int) -> int:
        file = real_open(path, *rest, **more)
        names[file] = Path(path).name
        return file

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(f"fsync {names[file]}"), real_fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"replace {Path(b).name}"), real_replace(a, b))[1])
    publish_file(tmp_path / "file", b"content")
    assert done == ["fsync .file.tmp", "replace file", f"fsync {tmp_path.name}"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    publish_file(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        publish_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "what was half written is taken away"
