"""The example of the whole loop: train, evaluate, choose, try, merge, ship, chat and report, in one script that people read first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

SCRIPT = Path(__file__).parents[1] / "examples" / "training_loop.py"


@pytest.mark.oracle
def test_the_whole_loop_runs_and_says_the_truth(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CKPT_")}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "loop")]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    for said in (
        "registered support-bot@v6",
        "`ckpt try` measures it",
        "it may stop",
        "shipped support-bot@",
        "would be removed",
    ):
        assert said in ended.stderr + ended.stdout, said
    assert re.search(r"^the moon is grey$", ended.stdout, flags=re.M)
    _look_at_what_is_left(tmp_path / "loop")


def _look_at_what_is_left(place: Path) -> None:
    with tiny.open_registry(place / "registry") as ckpt:
        (live,) = ckpt.shipped("production")
        chosen = ckpt.resolve("support-bot@candidate")
        assert live.checkpoint == chosen.ref == ckpt.rank("support-bot").groups[0].checkpoints[0].ref
        assert chosen.step is not None
        assert chosen.step < 120
        assert all(each.metric("questions/loss") is not None for each in ckpt.checkpoints("support-bot"))
        assert (chosen.metric("try/logit_difference") or 0.0) < 1e-3
        assert [each.action for each in ckpt.history(chosen.ref)].count("ship") == 1
    assert (place / "merged" / "merge.json").is_file()
    page = (place / "report.html").read_text()
    assert chosen.ref in page
    assert not re.search(r'(?:src|href)="https?:', page)
