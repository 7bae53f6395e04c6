"""Processor time of the commands that people type all day, and whether they import torch.

    python benchmarks/startup.py [--repeat 10] [--checkpoints 6 500] [--json out.json]

Registers that many checkpoints of a tiny adapter in a registry of its own, then runs each command in processes of their own. The figure is
the median of user plus system time; the limit is 0.35 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CKPT = Path(sys.executable).with_name("ckpt")
LIMIT_SECONDS = 0.35


def prepare(folder: Path, checkpoints: int) -> None:
    """Make a tiny base model and register checkpoints of one run, each with other values and two metrics."""
    import numpy as np
    from safetensors.numpy import save_file

    import registry
    from registry.manifest import Metric
    from registry.registering import Registration

    name = "model.layers.0.self_attn.q_proj"
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    save_file({f"{name}.weight": np.ones((16, 16), np.float32)}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with registry.connect() as ckpt:
        for step in range(checkpoints):
            factors = {"lora_A": np.full((2, 16), step + 1, np.float32), "lora_B": np.ones((16, 2), np.float32)}
            tensors = {f"base_model.model.{name}.{factor}.weight": values for factor, values in factors.items()}
            save_file(tensors, adapter / "adapter_model.safetensors")
            metrics = (
                Metric(name="eval_loss", value=1 / (step + 1)),
                Metric(name="accuracy", value=step / checkpoints),
            )
            said = Registration(base=str(base), adapter="bot", run="run", step=step, metrics=metrics)
            ckpt.register(str(adapter), said)


def processor_seconds(command: Sequence[str], environment: dict[str, str]) -> float:
    """User plus system time of one process."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_utime + usage.ru_stime


def imports_torch(arguments: Sequence[str], environment: dict[str, str]) -> bool:
    """Whether a command loads torch, as the interpreter's own import log tells."""
    command = [sys.executable, "-X", "importtime", str(CKPT), *arguments]
    log = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    return any(line.rpartition("|")[2].strip() == "torch" for line in log.splitlines())


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="Processor time of the commands that only look.")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[6, 500])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    results = []
    for checkpoints in options.checkpoints:
        with tempfile.TemporaryDirectory(prefix="ckpt-benchmark-") as folder:
            environment = {**os.environ, "CKPT_HOME": f"{folder}/home"}
            os.environ["CKPT_HOME"] = environment["CKPT_HOME"]
            prepare(Path(folder), checkpoints)
            for arguments in (["--help"], ["list"], ["list", "--best"], ["show", "bot"]):
                command = [str(CKPT), *arguments]
                seconds = statistics.median(processor_seconds(command, environment) for _ in range(options.repeat))
                torch = imports_torch(arguments, environment)
                results.append(
                    {"command": " ".join(arguments), "checkpoints": checkpoints, "seconds": seconds, "torch": torch}
                )
    print(f"{'command':16} {'checkpoints':>11} {'CPU s':>7}")
    for row in results:
        marks = ["  over the limit"] * (row["seconds"] > LIMIT_SECONDS) + ["  imports torch"] * row["torch"]
        print(f"ckpt {row['command']:11} {row['checkpoints']:>11} {row['seconds']:7.3f}{''.join(marks)}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
