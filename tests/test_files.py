import shutil
from pathlib import Path

import numpy as np
import pytest

import clipad
from clipad.io import files


def test_every_module_decides_the_version_of_the_code(tmp_path, monkeypatch):
    copy = tmp_path / "clipad"
    shutil.copytree(
        Path(clipad.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(files, "__file__", str(copy / "files.py"))

    def version():
        files.code_version.cache_clear()
        return files.code_version()

    original = version()
    modules = sorted(copy.rglob("*.py"))
    assert len(modules) > 20
    for path in modules:
        text = path.read_bytes()
        path.write_bytes(text + b"# changed\n")
        assert version() != original, path
        path.unlink()
        assert version() != original, path
        path.write_bytes(text)
    modules[0].rename(modules[0].with_name("moved.py"))
    assert version() != original
    monkeypatch.undo()
    files.code_version.cache_clear()


def test_what_is_kept_is_not_computed_again(tmp_path):
    path, calls = tmp_path / "a" / "x.npz", []

    def compute():
        calls.append(1)
        return {"values": np.arange(1000.0), "one": np.array(np.nan)}

    for _ in range(2):
        found = files.cached(path, compute)
        np.testing.assert_array_equal(found["values"], np.arange(1000.0))
        assert np.isnan(found["one"])
    assert len(calls) == 1
    content = path.read_bytes()
    middle = bytearray(content)
    middle[len(content) // 2] ^= 1
    for damaged in (b"", b"no arrays", content[:-100], bytes(middle)):
        path.write_bytes(damaged)
        np.testing.assert_array_equal(files.cached(path, compute)["values"], np.arange(1000.0))
        assert path.read_bytes() == content
    assert len(calls) == 5


def test_a_file_that_may_not_be_read_or_written_is_no_damage(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "folder.npz", tmp_path / "file" / "x.npz"):
        with pytest.raises(OSError):  # noqa: PT011  (which one depends on the system)
            files.cached(path, dict)


def test_equal_keys_have_one_address():
    assert files.address({"a": 1, "b": [2]}) == files.address({"b": [2], "a": 1})
    assert files.address({"a": 1}) != files.address({"a": 2})
