"""The command line in this process: `ckpt("list", "--json")` gives exit code, stdout and stderr."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import EXAMPLE, Ckpt, Result

from cli.app import main


@pytest.fixture
def ckpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ckpt:
    monkeypatch.setenv("CKPT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CKPT_USER", "ada")
    for name in ("CKPT_DATABASE_URL", "CKPT_STORE", "CKPT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(list(words))
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The example's run, with its base model beside it, in the working folder."""
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True)
    return tmp_path / "support-bot"


@pytest.fixture
def registered(ckpt: Ckpt, run_folder: Path) -> Ckpt:
    """A registry with the example's six checkpoints."""
    assert ckpt("register", str(run_folder)).code == 0
    return ckpt
