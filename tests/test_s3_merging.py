"""Merging into a store on S3: the bytes of a local merge, in little memory, whether the server copies what does not change or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import servers
import tiny
from s3_proxy import spoiling
from safetensors.numpy import save_file

import registry
from registry.locations import open_location
from registry.registering import Registration
from registry.settings import Settings

MOST_MEMORY_BYTES = 400_000_000
WIDTH, LAYERS, UNCHANGED = (
    1024,
    2,
    11,
)  # two tensors of 2 MiB for each layer, and so many of 13 MiB that no adapter changes

MERGE = """
import json, os, sys
import registry
from registry.registering import Registration
from registry.settings import Settings

os.cpu_count = lambda: 4  # each core in work takes its share of memory
base, adapter, how, out = sys.argv[1:]
with registry.connect(Settings.from_environment(os.environ)) as ckpt:
    ckpt.add_base(base, name="base", copy=how == "copied")
    (found,) = ckpt.register(adapter, Registration(base="base", adapter="bot")).registered
    if how == "copied":
        assert ckpt.base("base").in_store
    planned = ckpt.plan(found.checkpoint)
    result = ckpt.merge(planned, out=out or None)
files = {entry.path: entry.digest.hex for entry in result.merged.files}
# Not getrusage: what the process that started this one had counts there.
memory = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([files, int(memory) * 1024]))
"""


def write_large_base(folder: Path, *, unchanged: int) -> Path:
    """A model in one file, most of which an adapter on the queries leaves alone: so many tensors of 13 MiB in each layer. 11 make 312 MB."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((6 * WIDTH + 600, WIDTH)).astype(np.float16)
    tensors = {}
    for layer in range(LAYERS):
        for number in range(unchanged):
            tensors[f"model.layers.{layer}.mlp.w{number}.weight"] = rows * np.float16(1 + number / 16)
        for name in ("q_proj", "o_proj"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = rows[:WIDTH] * np.float16(1 + layer)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tiny.write_json(folder / "config.json", {**tiny.CONFIG, "hidden_size": WIDTH})
    return folder


def write_large_adapter(folder: Path, base: Path) -> Path:
    random, factors = np.random.default_rng(1), {}
    for layer in range(LAYERS):
        for letter, shape in (("A", (8, WIDTH)), ("B", (WIDTH, 8))):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{letter}.weight"
            factors[name] = random.normal(0, 0.1, shape).astype(np.float32)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    tiny.write_json(folder / "adapter_config.json", {**fields, "base_model_name_or_path": str(base)})
    return folder


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge by a process of its own: digests by path, the most memory it took, the bytes it sent to S3."""

    files: dict[str, str]
    memory_bytes: int
    sent_bytes: int


def merge(
    home: Path, s3: servers.Server, store: str, base: str, adapter: Path, *, how: str = "", out: str = ""
) -> Merged:
    with spoiling(s3.port) as passed:
        environment = {**os.environ, **servers.s3_environment(passed.port), "CKPT_HOME": str(home), "CKPT_STORE": store}
        child = subprocess.run(
            [sys.executable, "-c", MERGE, base, str(adapter), how, out],
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
        )
    files, memory_bytes = json.loads(child.stdout)
    return Merged(files, memory_bytes, passed.sent_bytes)


def digests(base: Path, adapter: Path, folder: Path) -> dict[str, str]:
    """What a merge into a folder of this machine gives."""
    with registry.connect(Settings.from_environment({"CKPT_HOME": str(folder / "here")})) as ckpt:
        ckpt.add_base(str(base), name="base")
        (found,) = ckpt.register(str(adapter), Registration(base="base", adapter="bot")).registered
        merged = ckpt.merge(ckpt.plan(found.checkpoint), out=str(folder / "out")).merged
    return {entry.path: entry.digest.hex for entry in merged.files}


def test_a_large_model_takes_little_memory(tmp_path: Path, s3: servers.Server, s3_url: str) -> None:
    base = write_large_base(tmp_path / "base", unchanged=11)
    adapter, size_bytes = write_large_adapter(tmp_path / "bot", base), (base / "model.safetensors").stat().st_size
    streamed = merge(tmp_path / "streamed", s3, s3_url + "/streamed", str(base), adapter)
    copied = merge(tmp_path / "copied", s3, s3_url + "/copied", str(base), adapter, how="copied")
    assert streamed.files == copied.files == digests(base, adapter, tmp_path)
    assert max(streamed.memory_bytes, copied.memory_bytes) < MOST_MEMORY_BYTES
    assert size_bytes < streamed.sent_bytes
    assert size_bytes < copied.sent_bytes < 1.3 * size_bytes  # the base goes there once, and the result's changed parts


def test_what_lies_on_the_same_s3_is_copied_there(tmp_path: Path, s3: servers.Server, s3_url: str) -> None:
    base = write_large_base(tmp_path / "base", unchanged=3)
    adapter, size_bytes = write_large_adapter(tmp_path / "bot", base), (base / "model.safetensors").stat().st_size
    servers.s3_filesystem(s3.port).put(str(base), s3_url + "/base", recursive=True)
    url, local = s3_url + "/base", tmp_path / "local"
    into_store = merge(tmp_path / "home", s3, s3_url + "/store", url, adapter)
    outside = merge(tmp_path / "outside", s3, str(local), url, adapter, out=s3_url + "/out")
    assert into_store.files == outside.files == digests(base, adapter, tmp_path)
    assert max(into_store.sent_bytes, outside.sent_bytes) < 0.6 * size_bytes
    assert open_location(s3_url + "/out").files() == open_location(str(tmp_path / "out")).files()


def test_what_a_killed_merge_had_sent_goes_when_it_is_done_again(
    tmp_path: Path, s3: servers.Server, s3_url: str
) -> None:
    base = write_large_base(tmp_path / "base", unchanged=2)
    adapter, system = write_large_adapter(tmp_path / "bot", base), servers.s3_filesystem(s3.port)
    bucket = s3_url[5:]
    for key in ("out/model.safetensors", "out/model.safetensors.mine"):
        begun = system.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        system.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"sent")
    made = merge(tmp_path / "home", s3, str(tmp_path / "store"), str(base), adapter, out=s3_url + "/out")
    assert made.files == digests(base, adapter, tmp_path)
    left = system.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", ())
    assert [upload["Key"] for upload in left] == ["out/model.safetensors.mine"]
