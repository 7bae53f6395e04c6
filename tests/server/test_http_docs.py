"""The examples of docs/http-api.md, run one after the other as somebody would who reads it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import tiny
from running import Server

from registry.manifest import Metric
from registry.registering import Registration

PAGE = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")


def test_the_examples_work(server: Server, base: Path, tmp_path: Path) -> None:
    server.direct.add_base(str(base), name="llama")
    place = tiny.write_adapter(tmp_path / "support-bot", base=base, seed=3)
    known = (
        server.direct.register(str(place), Registration(note="x", metrics=(Metric(name="eval_loss", value=0.8),)))
        .registered[0]
        .checkpoint
    )
    server.direct.set_alias(known, "candidate")
    shutil.copytree(place, tmp_path / "bot")
    tiny.write_adapter(tmp_path / "bot", base=base, seed=4)
    script = "\n".join(["set -euo pipefail", *re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S)])
    environment = {
        **os.environ,
        "CKPT_URL": server.url,
        "CKPT_TOKEN": server.secrets["writer"],
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    made = server.direct.resolve("http-bot")
    assert (made.run, made.step, made.metric("eval_loss"), made.notes[0].text) == ("lr-1e-4", 500, 0.71, "by curl")
    assert [note.text for note in server.direct.resolve("support-bot@v1").notes] == ["x", "reviewed"]
    weights = (place / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "whole.safetensors").read_bytes() == weights
    assert (tmp_path / "head.bin").read_bytes() == weights[:100]
    assert server.direct.merged()


def test_every_route_that_the_page_names_is_one() -> None:
    from registry.server.app import RULES

    known = {f"{rule.method} {rule.path}" for rule in RULES}
    for call in re.findall(r"`((?:GET|PUT|POST|DELETE) /[^`?]+)`", PAGE):
        assert call in known
