"""Registries of a team, workers in threads and in processes, and models that take as long to merge as a test needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiny
from safetensors.numpy import save_file

from registry.jobs import InlineEngine
from registry.service import Registry
from registry.settings import Settings
from registry.teamwork import Job
from registry.tensors import DType, TensorSpec, layout_safetensors
from registry.worker import Pace, Worker

ROOT = Path(__file__).parents[2]
# So short that a worker that is gone is noticed within seconds.
FAST = Pace(heartbeat=0.3, silent=2.0, tell=0.1, poll=0.2, deliver=0.5, recover=0.3)
FAST_OPTIONS = ("--heartbeat", "0.3", "--silent", "2", "--poll", "0.2")
# For what is not about that: a machine that stands still for a while is not gone.
PATIENT = ("--silent", "60")


def wait_until(is_so: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until something is so; fails when it takes so long that it will never be."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def team(home: Path, database_url: str, store_url: str, user: str = "ada") -> Registry:
    """A registry that several machines share."""
    environment = {"CKPT_HOME": str(home), "CKPT_DATABASE_URL": database_url, "CKPT_STORE": store_url}
    return Registry(Settings.from_environment({**environment, "CKPT_USER": user}))


def fill(registry: Registry, folder: Path, *, shards: int = 4, seed: int = 0) -> None:
    """A base model `base` of several files in the store, and an adapter `bot` that fits it."""
    base = tiny.write_base(folder / "base", shards=shards, seed=seed)
    registry.add_base(str(base), name="base", copy=True)
    registry.register(str(tiny.write_adapter(folder / "bot", base=base)))


def fill_large(registry: Registry, folder: Path, *, files: int = 2, tensors: int = 8, side: int = 512) -> None:
    """The same in bfloat16 with files of some size (by default 4 MiB), so that merging takes a while where the store is slow."""
    base, adapter = folder / "base", folder / "bot"
    base.mkdir(parents=True)
    adapter.mkdir()
    tiny.write_json(base / "config.json", {**tiny.CONFIG, "hidden_size": side})
    place = {
        f"model.layers.{file}.mlp.w{number}.weight": f"model-{file + 1:05}-of-{files:05}.safetensors"
        for file in range(files)
        for number in range(tensors)
    }
    for path in dict.fromkeys(place.values()):
        _write_weights(base / path, [name for name in place if place[name] == path], side)
    tiny.write_json(base / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": place})
    registry.add_base(str(base), name="base", copy=True)
    random, factors = np.random.default_rng(1), {}
    for name in place:
        for letter, shape in (("A", (8, side)), ("B", (side, 8))):
            factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight"] = random.normal(
                0, 0.02, shape
            ).astype(np.float32)
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": str(base)}
    tiny.write_json(
        adapter / "adapter_config.json", {**fields, "target_modules": [f"w{number}" for number in range(tensors)]}
    )
    registry.register(str(adapter))


def _write_weights(path: Path, names: list[str], side: int) -> None:
    """Square matrices, normal with standard deviation 0.02, as bfloat16."""
    random = np.random.default_rng(len(names[0]) + int(path.name[6:11]))
    with path.open("wb") as stream:
        stream.write(
            layout_safetensors(
                [TensorSpec(name, DType.BF16, (side, side)) for name in names], {"format": "pt"}, path.name
            )[0]
        )
        for _ in names:
            values = random.normal(0, 0.02, (side, side)).astype(np.float32)
            stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


@contextmanager
def worker_process(
    environment: Mapping[str, str], *options: str, log: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`ckpt worker` with short times. Killed at the end if it is still there."""
    with (log or Path(os.devnull)).open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "worker", *FAST_OPTIONS, *options],
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


@contextmanager
def worker_thread(registry: Registry, **settings: object) -> Iterator[Worker]:
    """A worker in a thread of this process."""
    worker = Worker(registry, pace=FAST, grace_seconds=5.0, **settings)  # type: ignore[arg-type]
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def inline(registry: Registry) -> Iterator[InlineEngine]:
    engine = InlineEngine(registry, poll_seconds=0.05)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(5.0)


def texts(registry: Registry, job: Job) -> list[str]:
    """A job's log without times."""
    return [line.text for line in registry.job_log(job.id)]
