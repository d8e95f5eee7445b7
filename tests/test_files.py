"""Files are whole or absent."""

import errno
import os
import stat

import pytest

from learnsched.files import replacing, write, write_text


def test_a_text_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one\n", "zwei ü\n"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["a.txt"]


def test_paths_may_be_strings(tmp_path):
    write_text(str(tmp_path / "a.txt"), "text")
    assert (tmp_path / "a.txt").read_text() == "text"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_keeps_the_file_that_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failing_disk_keeps_the_file_that_was_there(tmp_path, monkeypatch, name):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("named", [None, "temporary"])
def test_an_error_of_the_disk_names_the_file(tmp_path, named):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space") as caught, replacing(path) as temporary:
        raise OSError(errno.ENOSPC, "No space", str(temporary) if named else None)
    assert caught.value.filename == str(path)


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    other = str(tmp_path / "other.txt")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a.txt"):
        open(other).close()
    assert caught.value.filename == other


def test_readers_see_the_old_file_until_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.parent == tmp_path  # the same file system, so that a rename is atomic
        assert temporary.suffix == ".bin"
    assert path.read_bytes() == b"new"


def test_a_writer_gets_the_path(tmp_path):
    write(tmp_path / "a.bin", lambda p: p.write_bytes(b"data"))
    assert (tmp_path / "a.bin").read_bytes() == b"data"


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "text")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_a_file_that_was_there_hands_on_its_permissions(tmp_path):
    write_text(tmp_path / "a.txt", "first")
    (tmp_path / "a.txt").chmod(0o600)
    write_text(tmp_path / "a.txt", "second")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o600


def test_behind_a_link_it_is_the_file_that_is_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "data" / "a.txt")
    for text in ("first", "second"):  # ahead of the file, and with it
        write_text(tmp_path / "link.txt", text)
        assert (tmp_path / "link.txt").is_symlink()
        assert (tmp_path / "data" / "a.txt").read_text() == text
    assert os.listdir(tmp_path / "data") == ["a.txt"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "a.txt", "text")


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match="a"):
        write_text(tmp_path / "a", "text")
    assert os.listdir(tmp_path) == ["a"]


def test_devices_and_pipes_are_not_replaced(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "null"
    os.mkfifo(pipe)
    link.symlink_to(os.devnull)
    for path in (pipe, link):
        with pytest.raises(OSError, match=f"not a regular file.*{path}"):
            write_text(path, "text")
    assert pipe.is_fifo()
    assert link.is_symlink()
