"""The main job on a real, tiny training run, with every command printed as you would type it. `make demo` runs this.

Everything happens in a temporary folder with a registry of its own; nothing of yours is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = [
    ("A fine-tuning run left six checkpoints. Register them all; metrics, steps and the base model are in the files.",
     ["ckpt register support-bot"]),
    ("Which one is best? (Not the last: it has begun to overfit.)", ["ckpt list", "ckpt list --best"]),
    ("Does it really belong to that base model, every tensor of it?", ["ckpt check support-bot@best"]),
    ("What would merging do? Then do it.", ["ckpt merge support-bot@best --dry-run", "ckpt merge support-bot@best --out merged"]),
    ("Is the merged model right? Compare with base + scale · B·A in float64, without ckpt's own code.",
     ["python verify.py tiny-llama support-bot/checkpoint-160 merged"]),
    ("Ship it, and know for ever what was live when.",
     ["ckpt ship support-bot@best --to production --note 'first release'", "ckpt shipped", "ckpt show support-bot@production"]),
]  # fmt: skip


def main() -> None:
    color = sys.stdout.isatty()
    with tempfile.TemporaryDirectory(prefix="ckpt-demo-") as name:
        place = Path(name)
        shutil.copytree(HERE / "support-bot", place, dirs_exist_ok=True)
        shutil.copy(HERE / "verify.py", place)
        programs = Path(sys.executable).parent
        environment = {
            **os.environ,
            "CKPT_HOME": str(place / "registry"),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        }
        for why, commands in STEPS:
            print(f"\n\033[1m# {why}\033[0m" if color else f"\n# {why}", flush=True)
            for command in commands:
                print(f"\033[36m$ {command}\033[0m" if color else f"$ {command}", flush=True)
                subprocess.run(command, shell=True, cwd=place, env=environment, check=True)
    print("\nThat was the main job. Now on your own run: ckpt register PATH")


if __name__ == "__main__":
    main()
