"""The Hub's own clients, old and new, each in an environment of its own, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from safetensors.numpy import save_file

from registry.registering import Registration
from registry.service import Registry

CLIENTS = ("hub-0.36", "hub-2")
_ALL_AT_ONCE = """
import json, sys
import huggingface_hub
from huggingface_hub import *
from huggingface_hub import errors
api = HfApi()

def failed(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]
"""


@dataclass
class Client:
    """One of the Hub's clients, with an empty cache, talking to a server as somebody."""

    name: str
    url: str
    token: str
    home: Path

    @property
    def bin(self) -> Path:
        """Where its Python and its commands are: of no name, those of the tests themselves, with transformers and PEFT."""
        return Path(sys.prefix) / (f"clients/{self.name}" if self.name else "") / "bin"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CKPT_", "PYTHON"))}
        told = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        told |= {"HF_HUB_ETAG_TIMEOUT": "300", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}  # on however slow a machine
        return {**kept, **told, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **({"HF_TOKEN": self.token} if self.token else {})}

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of its commands."""
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def does(self, script: str, **environment: str) -> Any:
        """Run a script; gives what it has put into `told`. `api` is there, and `failed`, which gives an error's class and text."""
        source = f"{_ALL_AT_ONCE}\n{script}\nprint(json.dumps(told, default=str))"
        ran = self.run("python", "-c", source, **environment)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])


def add_large(registry: Registry, folder: Path, name: str) -> Path:
    """An adapter trained on `NAME-llama`, a base model of one file of 64 MB; gives the base's folder."""
    rows = 1_000_000
    base = tiny.write_base(folder / f"{name}-llama", config={"vocab_size": rows})
    tensors = {**tiny.base_tensors(), "model.embed_tokens.weight": np.full((rows, tiny.WIDTH), len(name), np.float32)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    registry.add_base(str(base), name=f"{name}-llama")
    place = tiny.write_adapter(folder / name, base=base, seed=50)
    registry.register(str(place), Registration(adapter=name))
    return base
