"""Run commands in processes of their own: wall seconds, peak memory, and what the machine is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("ckpt-registry", "torch", "peft", "transformers", "mergekit", "litgpt", "safetensors", "blake3", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One process: wall seconds of what is measured, and the process's largest resident set."""

    seconds: float
    peak_bytes: int


def spawn(command: Sequence[str], home: Path) -> tuple[Sample, str]:
    """Run a command with a registry of its own; what it took, and what it printed."""
    environment = {**os.environ, "CKPT_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as talk:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=talk, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        talk.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{talk.read()[-4000:]}")
        return Sample(seconds=seconds, peak_bytes=usage.ru_maxrss << 10), out.read()


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def program(name: str) -> str:
    """A command of the environment that Python runs in."""
    return str(Path(sys.executable).with_name(name))
