"""Time and peak memory of a merge, next to `cp -r` of the base and to PEFT, in one run on one machine.

    python benchmarks/merge.py [--layers 22] [--repeat 5] [--folder /dev/shm] [--json out.json]

Makes a Llama-shaped bfloat16 base model (2.2 GB with 22 layers) in shards of about 500 MB and a PEFT LoRA of rank 16 on all its linear
layers. Every figure is a median over processes of its own, the contestants taking turns. Peak memory is the process's largest resident set.
Before each run a copy of the base is written and deleted: the first use of memory costs a virtual machine more than everything measured here.
All of it, the registry's database and store included, lies in one temporary folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from registry.tensors import DType, TensorSpec, layout_safetensors

SHARD_BYTES = 500 << 20
RANK, ALPHA = 16, 32
CKPT = Path(sys.executable).with_name("ckpt")
CONTESTANTS = ("cp -r", "engine", "ckpt merge", "PEFT")
COMPARED = ("engine", "PEFT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """The shape of the base model."""

    layers: int
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    key_value_heads: int = 4
    vocabulary: int = 32000

    def linear(self) -> dict[str, tuple[int, int]]:
        """Every linear layer, `[d_out, d_in]`."""
        narrow = self.hidden // self.heads * self.key_value_heads
        shapes = {
            "self_attn.q_proj": (self.hidden, self.hidden), "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden), "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden), "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }  # fmt: skip
        return {f"model.layers.{layer}.{name}": shape for layer in range(self.layers) for name, shape in shapes.items()}

    def tensors(self) -> list[TensorSpec]:
        """Every tensor, in order."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        shapes |= {f"{name}.weight": shape for name, shape in self.linear().items()}
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{layer}.{norm}.weight"] = (self.hidden,)
        shapes |= {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}
        return [TensorSpec(name, DType.BF16, shape) for name, shape in shapes.items()]

    def config(self) -> dict[str, object]:
        """What goes into `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads, "vocab_size": self.vocabulary, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "silu",
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One process: wall seconds of what is measured, and the process's peak resident memory."""

    seconds: float
    peak_bytes: int


# ---- input


def write_base(folder: Path, shape: Llama) -> None:
    """Write the base model shard by shard; weights are normal with standard deviation 0.02."""
    import numpy as np

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    pool = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)
    words = np.resize((pool.view(np.uint32) >> 16).astype(np.uint16), shape.vocabulary * shape.hidden + pool.size)
    shards: list[list[TensorSpec]] = [[]]
    for spec in shape.tensors():
        if sum(each.size_bytes for each in shards[-1]) + spec.size_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(layout_safetensors(specs, {"format": "pt"}, file)[0])
            for spec in specs:
                start = len(weight_map) * 7919  # so that no two tensors are the same
                stream.write(words[start : start + spec.elements].tobytes())
                weight_map[spec.name] = file
    index = {"metadata": {"total_size": sum(s.size_bytes for s in shape.tensors())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(folder: Path, base: Path, shape: Llama) -> None:
    """Write a LoRA with float32 factors whose delta is about a tenth of the weights."""
    import numpy as np

    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": str(base),
        "target_modules": sorted({name.rpartition(".")[2] for name in shape.linear()}), "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    specs = []
    for name, (d_out, d_in) in shape.linear().items():
        specs.append(TensorSpec(f"base_model.model.{name}.lora_A.weight", DType.F32, (RANK, d_in)))
        specs.append(TensorSpec(f"base_model.model.{name}.lora_B.weight", DType.F32, (d_out, RANK)))
    values = np.random.default_rng(1)
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        stream.write(layout_safetensors(specs, {"format": "pt"}, "adapter_model.safetensors")[0])
        for spec in specs:
            stream.write(values.normal(0, 0.016, spec.elements).astype(np.float32).tobytes())


def touch_memory(folder: Path) -> None:
    """Have as much free memory ready as a run will fill."""
    shutil.copytree(folder / "base", folder / "touched")
    shutil.rmtree(folder / "touched")


# ---- contestants, each in a process of its own


def run_engine(folder: Path) -> None:
    """Merge after start-up, and print the seconds: everything is registered, checked, planned and imported before the clock starts."""
    import registry
    import registry.merge.engine  # part of the start-up

    with registry.connect() as ckpt:
        planned = ckpt.plan(ckpt.resolve("adapter"))
        touch_memory(folder)
        start = time.perf_counter()
        ckpt.merge(planned, out=str(folder / "engine"))
        print(time.perf_counter() - start)


def run_peft(folder: Path) -> None:
    """Merge as PEFT's documentation says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload().save_pretrained(folder / "PEFT")


def prepare(folder: Path, layers: int) -> None:
    """Make the input and register it."""
    import registry
    from registry.registering import Registration

    shape = Llama(layers=layers)
    write_base(folder / "base", shape)
    write_adapter(folder / "adapter", folder / "base", shape)
    with registry.connect() as ckpt:
        ckpt.register(str(folder / "adapter"), Registration(base=str(folder / "base")))


def compare(folder: Path) -> None:
    """Print how many elements differ between our result and PEFT's, and by how many roundings at most.

    One rounding is the spacing of bfloat16 numbers at the larger of base weight and result: PEFT rounds the delta, then the sum.
    """
    import torch
    from safetensors import safe_open

    def tensors(name: str) -> dict[str, Path]:
        found = {}
        for path in (folder / name).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    def read(path: Path, name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found.float()

    places = [tensors(name) for name in ("base", "engine", "PEFT")]
    elements, different, worst = 0, 0, 0.0
    for name in places[0]:
        base, ours, theirs = (read(place[name], name) for place in places)
        _, exponent = torch.frexp(torch.maximum(base.abs(), torch.maximum(ours.abs(), theirs.abs())))
        gap = (ours - theirs).abs()
        elements, different = elements + gap.numel(), different + int(torch.count_nonzero(gap))
        worst = max(worst, float((gap / torch.ldexp(torch.tensor(1.0), exponent - 8)).max()))
    print(json.dumps({"elements": elements, "different": different, "most_roundings": worst}))


CHILDREN: Mapping[str, Callable[..., None]] = {
    "prepare": prepare, "engine": run_engine, "PEFT": run_peft, "compare": compare,
}  # fmt: skip


# ---- measuring


def spawn(command: Sequence[str], folder: Path) -> tuple[Sample, str]:
    """Run a command; how long it took, its peak memory, and what it printed."""
    environment = {**os.environ, "CKPT_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as talk:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=talk, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        talk.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{talk.read()}")
        return Sample(seconds=seconds, peak_bytes=usage.ru_maxrss << 10), out.read()


def child(name: str, folder: Path, *more: str) -> tuple[Sample, str]:
    """Run one of this file's functions in a fresh interpreter."""
    return spawn([sys.executable, __file__, "--child", name, str(folder), *more], folder)


def measure(name: str, folder: Path) -> Sample:
    """One run of a contestant, which leaves its result in a folder of its name."""
    out = folder / name
    shutil.rmtree(out, ignore_errors=True)
    touch_memory(folder)
    if name == "cp -r":
        return spawn(["cp", "-r", str(folder / "base"), str(out)], folder)[0]
    if name == "ckpt merge":
        return spawn([str(CKPT), "merge", "adapter", "--out", str(out)], folder)[0]
    sample, printed = child(name, folder)
    return Sample(seconds=float(printed), peak_bytes=sample.peak_bytes) if name == "engine" else sample


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("ckpt-registry", "torch", "peft", "transformers", "safetensors", "blake3")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """The figures for people."""
    lines = [f"{'':12} {'seconds':>8} {'x cp':>6} {'peak MB':>8}"]
    lines += [
        f"{name:12} {found['seconds']:8.2f} {found['times_cp']:6.2f} {found['peak_bytes'] / 1e6:8.0f}"
        for name, found in results.items()
    ]
    return "\n".join(lines)


def benchmark(folder: Path, layers: int, repeat: int, contestants: Sequence[str]) -> dict[str, object]:
    """Prepare, let the contestants take turns, compare the results."""
    child("prepare", folder, str(layers))
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for turn in range(repeat):
        for name in contestants:
            samples[name].append(measure(name, folder))
            if name not in COMPARED:
                shutil.rmtree(folder / name)
            print(f"{turn + 1}/{repeat} {name}: {samples[name][-1].seconds:.2f} s", file=sys.stderr)
    copying = statistics.median(sample.seconds for sample in samples["cp -r"])
    results = {}
    for name, found in samples.items():
        seconds = statistics.median(sample.seconds for sample in found)
        peak = max(sample.peak_bytes for sample in found)
        results[name] = {"seconds": seconds, "times_cp": seconds / copying, "peak_bytes": peak}
    base_bytes = sum(path.stat().st_size for path in (folder / "base").iterdir())
    print(f"{base_bytes / 1e9:.2f} GB base model, medians of {repeat} on {folder.parent}\n{table(results)}")
    report = {
        "machine": machine(), "shape": asdict(Llama(layers=layers)), "base_bytes": base_bytes, "rank": RANK,
        "folder": str(folder.parent), "repeat": repeat, "results": results,
    }  # fmt: skip
    if results.keys() >= set(COMPARED):
        report["against_peft"] = found = json.loads(child("compare", folder)[1])
        print(
            f"against PEFT: {found['different']:,} of {found['elements']:,} elements differ, "
            f"by {found['most_roundings']:.0f} rounding at most"
        )
    return report


def roomy_folder(layers: int) -> Path:
    """Memory when six copies of the model fit, so that the disk does not count; else the usual temporary folder."""
    memory = Path("/dev/shm")
    needed = 6 * sum(spec.size_bytes for spec in Llama(layers=layers).tensors())
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > needed else Path(tempfile.gettempdir())


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="Time and peak memory of a merge next to cp and PEFT.")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; /dev/shm when it has room")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS[1:], default=CONTESTANTS[1:], help="beside cp -r")
    options = parser.parse_args()
    parent = options.folder or roomy_folder(options.layers)
    with tempfile.TemporaryDirectory(prefix="ckpt-benchmark-", dir=parent) as folder:
        report = benchmark(Path(folder), options.layers, options.repeat, ("cp -r", *options.only))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name, folder, *more = sys.argv[2:]
        CHILDREN[name](Path(folder), *map(int, more))
    else:
        main()
