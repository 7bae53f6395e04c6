"""Runs that are resumed, and reports, in all three ways to run a registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from sites import Maker

from registry.manifest import BaseModel, Metric
from registry.registering import Registration
from registry.report_forms import to_html, to_markdown
from registry.reporting import report
from registry.resuming import resume
from registry.service import Registry


@pytest.fixture
def run(tmp_path: Path, base: BaseModel) -> Path:
    """A checkpoint with the state of its trainer."""
    folder = tiny.write_adapter(tmp_path / "run/checkpoint-5", base=base.name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 5, "log_history": []}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(name.encode())
    return folder.parent


def test_a_resumed_run_points_back(ckpt: Registry, run: Path, tmp_path: Path) -> None:
    said = Registration(adapter="bot", base="base", with_state=True)
    parent = ckpt.register(str(run), said).registered[0].checkpoint
    found = resume(ckpt, parent, tmp_path / "again")
    assert tiny.contents(found.place) == tiny.contents(run / "checkpoint-5")
    tiny.write_adapter(tmp_path / "again/checkpoint-9", base="base", seed=9)
    old, new = ckpt.register(str(tmp_path / "again"), Registration(base="base")).registered
    assert (old.created, old.checkpoint.ref) == (False, parent.ref)
    assert new.checkpoint.origin is not None
    assert (new.checkpoint.origin.action, new.checkpoint.origin.parents) == ("resume", (parent.ref,))
    assert ckpt.details(parent).children == (new.checkpoint.ref,)
    without = ckpt.register(str(run), Registration(adapter="bare", base="base")).registered[0]
    assert set(without.left_out) == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_a_report_is_gathered(ckpt: Registry, make: Maker) -> None:
    for step, loss in ((10, 0.5), (20, 0.3)):
        ckpt.add_metrics(make(step=step, run="first"), [Metric(name="eval_loss", value=loss)])
    ckpt.ship(ckpt.resolve("bot@v1"), "production")
    found = report(ckpt, "bot", "eval_loss min")
    assert "bot@v2 has the lowest eval_loss" in to_html(found)
    assert "bot@v2 against bot@v1, which is live in production" in to_markdown(found)
