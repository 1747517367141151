import shutil
from pathlib import Path

import clipad
from clipad import files


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
