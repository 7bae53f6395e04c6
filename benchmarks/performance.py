"""Every figure that the merge engine is held to, in one run on one machine.

    python benchmarks/performance.py [--repeat 5] [--layers 22] [--folder /dev/shm] [--disk /var/tmp] [--json out.json] [--only SECTION ...]

Contestants take turns, each run in a process of its own; figures are medians, peak memory is the largest resident set of any run. Before each
run as much memory as it will fill is written to and freed: the first use of memory costs a virtual machine more than everything measured here.
All input is made here, and all of it is removed at the end. Close other programs: two cores are quickly taken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from inputs import Llama, write_adapter, write_base, write_litgpt
from measuring import Sample, machine, program, spawn

LARGE = Llama(layers=80, hidden=8192, intermediate=28672, heads=64, key_value_heads=8, vocabulary=128256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table: what was measured, and what it must not exceed (`at_most`) or must reach (`at_least`)."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is where it must be."""
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


# ---- what runs in a process of its own


def prepare(folder: Path, layers: int) -> None:
    """Make a base, three adapters on it, and register them."""
    import registry
    from registry.registering import Registration

    shape = Llama(layers=layers)
    write_base(folder / "base", shape)
    with registry.connect() as ckpt:
        for number in (1, 2, 3):
            write_adapter(folder / f"adapter-{number}", folder / "base", shape, seed=number)
            ckpt.register(str(folder / f"adapter-{number}"), Registration(base=str(folder / "base")))


def prepare_litgpt(folder: Path, layers: int) -> None:
    """Make and register a litgpt base and a LoRA on it."""
    import registry
    from registry.registering import Registration

    write_litgpt(folder / "litgpt-base", folder / "litgpt-adapter", Llama(layers=layers))
    with registry.connect() as ckpt:
        ckpt.register(str(folder / "litgpt-adapter"), Registration(base=str(folder / "litgpt-base"), adapter="litgpt"))


def engine(folder: Path, out: Path) -> None:
    """Merge after start-up, and print the seconds: all is registered, checked, planned and imported before the clock starts."""
    import registry
    import registry.merge.engine  # part of the start-up

    with registry.connect() as ckpt:
        planned = ckpt.plan(ckpt.resolve("adapter-1"))
        touch_memory(folder, out.parent)
        start = time.perf_counter()
        ckpt.merge(planned, out=str(out))
        print(time.perf_counter() - start)


class _Unhashed:
    """Takes weights in without looking at them, and knows the digest that is expected, if any; small files are hashed as ever."""

    def __init__(self, digest: str = "") -> None:
        self._digest, self._hasher = digest, blake3()

    def update(self, data: memoryview) -> None:
        """Nothing, for large pieces."""
        if len(data) < 1 << 19:
            self._hasher.update(data)

    def hexdigest(self) -> str:
        """Whatever was expected."""
        return self._digest or self._hasher.hexdigest()


def engine_without_digests(folder: Path, out: Path) -> None:
    """The same with the hashing taken out, to see what it costs; no option of the product does that."""
    import registry
    import registry.merge.engine
    import registry.merge.sinks

    with registry.connect() as ckpt:
        expected = {spec.name: digest.hex for spec, digest in _known_digests(ckpt)}
    registry.merge.engine.tensor_hasher = lambda spec: _Unhashed(expected[spec.name])
    registry.merge.sinks.blake3 = _Unhashed  # type: ignore[misc, assignment]
    engine(folder, out)


def _known_digests(ckpt: object) -> list[tuple[object, object]]:
    (base,) = [each for each in ckpt.bases() if each.format.value == "safetensors"]  # type: ignore[attr-defined]
    return [(tensor.spec, base.fingerprint.tensors[tensor.spec.name]) for tensor in base.tensors]


def peft(folder: Path, out: Path) -> None:
    """Merge as PEFT's documentation says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(folder / "adapter-1")).merge_and_unload().save_pretrained(out)


def fingerprint(folder: Path) -> None:
    """Fingerprint the base with nothing cached, and print the seconds."""
    from registry.fingerprint import DigestCache, digest_tensors
    from registry.formats.base_model import read_base
    from registry.locations import open_location

    location = open_location(str(folder / "base"))
    start = time.perf_counter()
    digest_tensors(location, read_base(location).tensors, cache=DigestCache(folder / "nothing"))
    print(time.perf_counter() - start)
    shutil.rmtree(folder / "nothing")


def plan_large() -> None:
    """Match and plan a LoRA on all linear layers of a 70 B model from headers alone, and print the seconds."""
    import planning

    print(planning.seconds_to_plan(LARGE))


def compare(folder: Path, ours: Path, theirs: Path) -> None:
    """Print how many elements differ between our result and PEFT's, and by how many roundings at most.

    One rounding is the spacing of bfloat16 numbers at the larger of base weight and result: PEFT rounds the delta, then the sum.
    """
    import torch
    from safetensors import safe_open

    def tensors(place: Path) -> dict[str, Path]:
        found = {}
        for path in place.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    def read(path: Path, name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found.float()

    places = [tensors(place) for place in (folder / "base", ours, theirs)]
    elements, different, worst = 0, 0, 0.0
    for name in places[0]:
        base, one, other = (read(place[name], name) for place in places)
        _, exponent = torch.frexp(torch.maximum(base.abs(), torch.maximum(one.abs(), other.abs())))
        gap = (one - other).abs()
        elements, different = elements + gap.numel(), different + int(torch.count_nonzero(gap))
        worst = max(worst, float((gap / torch.ldexp(torch.tensor(1.0), exponent - 8)).max()))
    print(json.dumps({"elements": elements, "different": different, "most_roundings": worst}))


CHILDREN: Mapping[str, Callable[..., None]] = {
    "prepare": prepare, "prepare_litgpt": prepare_litgpt, "engine": engine, "engine_without_digests": engine_without_digests, "peft": peft,
    "fingerprint": fingerprint, "plan_large": plan_large, "compare": compare,
}  # fmt: skip


# ---- measuring


def touch_memory(folder: Path, where: Path) -> None:
    """Have as much free memory ready as a run will fill."""
    shutil.copytree(folder / "base", where / "touched")
    shutil.rmtree(where / "touched")


class Bench:
    """A folder with the input, and where results go."""

    def __init__(self, folder: Path, repeat: int, layers: int) -> None:
        self.folder, self.repeat, self.layers = folder, repeat, layers
        self.home = folder / "home"
        self.samples: dict[str, list[Sample]] = {}

    def child(self, name: str, *arguments: object, home: str = "home") -> tuple[Sample, str]:
        """One of this file's functions in a fresh interpreter."""
        return spawn([sys.executable, __file__, "--child", name, *map(str, arguments)], self.folder / home)

    def timed(self, name: str, *arguments: object, home: str = "home") -> Sample:
        """The same for functions that print how long it took."""
        sample, printed = self.child(name, *arguments, home=home)
        return Sample(seconds=float(printed.split()[-1]), peak_bytes=sample.peak_bytes)

    def rounds(self, contestants: Mapping[str, Callable[[], Sample]], where: Path, repeat: int | None = None) -> None:
        """Let contestants take turns; what they leave in `where / "out"` is removed."""
        for turn in range(repeat or self.repeat):
            for name, run in contestants.items():
                shutil.rmtree(where / "out", ignore_errors=True)
                touch_memory(self.folder, where)
                self.samples.setdefault(name, []).append(run())
                print(f"{turn + 1} {name}: {self.samples[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
        shutil.rmtree(where / "out", ignore_errors=True)

    def seconds(self, name: str) -> float:
        """Median seconds of a contestant."""
        return statistics.median(sample.seconds for sample in self.samples[name])

    def peak(self, name: str) -> float:
        """Largest resident set of a contestant, MB."""
        return max(sample.peak_bytes for sample in self.samples[name]) / 1e6

    def times(self, name: str, other: str, **bound: float) -> Figure:
        """How many times as long one contestant takes as another."""
        return Figure(name=f"{name}, times {other}", value=self.seconds(name) / self.seconds(other), unit="x",
                      detail=f"{self.seconds(name):.2f} s against {self.seconds(other):.2f} s", **bound)  # type: ignore[arg-type]  # fmt: skip

    def memory(self, name: str, at_most: float) -> Figure:
        """Peak memory of a contestant."""
        return Figure(name=f"{name}, peak memory", value=self.peak(name), unit="MB", at_most=at_most)


def ckpt(bench: Bench, *words: str) -> Callable[[], Sample]:
    """A whole command."""
    return lambda: spawn([program("ckpt"), *words], bench.home)[0]


def in_memory(bench: Bench) -> list[Figure]:
    """Next to `cp -r`, PEFT and mergekit, on a file system in memory."""
    folder, out = bench.folder, bench.folder / "out"
    shutil.copytree(
        bench.home, folder / "home-without-digests"
    )  # a registry that must not know what the files' digests should be
    recipe = folder / "mergekit.yaml"
    recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": [
        {"model": f"{folder / 'base'}+{folder / 'adapter-1'}", "parameters": {"weight": 1.0}}]}))  # fmt: skip
    mergekit = [program("mergekit-yaml"), str(recipe), str(out), "--lora-merge-cache", str(folder / "cache")]

    def run_mergekit() -> Sample:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        return spawn(mergekit, bench.home)[0]

    bench.rounds(
        {
            "cp -r": lambda: spawn(["cp", "-r", str(folder / "base"), str(out)], bench.home)[0],
            "engine": lambda: bench.timed("engine", folder, out),
            "engine without digests": lambda: bench.timed(
                "engine_without_digests", folder, out, home="home-without-digests"
            ),
            "ckpt merge": ckpt(bench, "merge", "adapter-1", "--out", str(out)),
            "import torch": lambda: spawn([sys.executable, "-c", "import torch"], bench.home)[0],
            "PEFT": lambda: bench.child("peft", folder, out)[0],
            "mergekit": run_mergekit,
        },
        folder,
    )
    shutil.rmtree(folder / "cache", ignore_errors=True)
    allowed = 2 * bench.seconds("cp -r") + bench.seconds("import torch") + 0.5
    return [
        bench.times("engine", "cp -r", at_most=2.0),
        bench.times("engine without digests", "cp -r", at_most=1.5),
        Figure(name="ckpt merge, 2 x `cp -r` + `import torch` + 0.5 s", value=bench.seconds("ckpt merge"), unit="s", at_most=allowed),
        bench.times("PEFT", "ckpt merge", at_least=6.0),
        bench.times("mergekit", "ckpt merge", at_least=4.0),
        bench.memory("engine", 400), bench.memory("ckpt merge", 400),
    ]  # fmt: skip


def against_peft(bench: Bench) -> dict[str, float]:
    """Whether PEFT's result and ours are the same."""
    ours, theirs = bench.folder / "ours", bench.folder / "theirs"
    bench.child("engine", bench.folder, ours)
    bench.child("peft", bench.folder, theirs)
    found: dict[str, float] = json.loads(bench.child("compare", bench.folder, ours, theirs)[1])
    shutil.rmtree(ours)
    shutil.rmtree(theirs)
    return found


def litgpt(bench: Bench) -> list[Figure]:
    """Next to `litgpt merge_lora`, both in litgpt's own format."""
    folder, out = bench.folder, bench.folder / "out"
    bench.child("prepare_litgpt", folder, bench.layers)

    def run_litgpt() -> Sample:
        (folder / "litgpt-adapter" / "lit_model.pth").unlink(missing_ok=True)
        return spawn([program("litgpt"), "merge_lora", str(folder / "litgpt-adapter")], bench.home)[0]

    bench.rounds(
        {"ckpt merge, litgpt": ckpt(bench, "merge", "litgpt", "--out", str(out)), "litgpt merge_lora": run_litgpt},
        folder,
    )
    shutil.rmtree(folder / "litgpt-base")
    shutil.rmtree(folder / "litgpt-adapter")
    return [
        bench.times("litgpt merge_lora", "ckpt merge, litgpt", at_least=4.0),
        bench.memory("ckpt merge, litgpt", 400),
    ]


def on_disk(bench: Bench, disk: Path) -> list[Figure]:
    """Next to `cp` and a sync of what it wrote, on a disk."""
    with tempfile.TemporaryDirectory(prefix="ckpt-benchmark-", dir=disk) as place:
        where = Path(place)
        copy = f"cp -r {bench.folder / 'base'} {where / 'out'} && sync {where / 'out'}/*"
        bench.rounds(
            {
                "cp + fsync, disk": lambda: spawn(["sh", "-c", copy], bench.home)[0],
                "engine, disk": lambda: bench.timed("engine", bench.folder, where / "out"),
            },
            where,
        )
    return [bench.times("engine, disk", "cp + fsync, disk", at_most=1.05)]


def fingerprints(bench: Bench) -> list[Figure]:
    """Next to reading and to `sha256sum`, from the page cache."""
    files = " ".join(str(path) for path in sorted((bench.folder / "base").glob("*.safetensors")))
    cores = os.cpu_count() or 1
    bench.rounds(
        {
            "cat": lambda: spawn(["sh", "-c", f"cat {files} > /dev/null"], bench.home)[0],
            "sha256sum": lambda: spawn(["sh", "-c", f"echo {files} | xargs -n1 -P{cores} sha256sum"], bench.home)[0],
            "fingerprint": lambda: bench.timed("fingerprint", bench.folder),
        },
        bench.folder,
    )
    return [bench.times("fingerprint", "cat", at_most=2.0), bench.times("sha256sum", "fingerprint", at_least=3.0)]


def planning(bench: Bench) -> list[Figure]:
    """A plan from headers."""
    seconds = statistics.median(bench.timed("plan_large").seconds for _ in range(bench.repeat))
    return [Figure(name="plan of a 70 B model", value=seconds, unit="s", at_most=1.0)]


def combining(bench: Bench) -> list[Figure]:
    """TIES of three adapters."""
    words = [
        "merge",
        "adapter-1",
        "adapter-2",
        "adapter-3",
        "--method",
        "ties",
        "--density",
        "0.2",
        "--out",
        str(bench.folder / "out"),
    ]
    bench.rounds({"TIES of three": ckpt(bench, *words)}, bench.folder, repeat=1)
    return [bench.memory("TIES of three", 600)]


def three_times_larger(parent: Path, layers: int) -> list[Figure]:
    """Peak memory and time of a base three times larger."""
    with tempfile.TemporaryDirectory(prefix="ckpt-benchmark-", dir=parent) as place:
        bench = Bench(Path(place), 1, 3 * layers)
        bench.child("prepare", place, 3 * layers)
        out = Path(place) / "out"
        larger = "3x larger base"
        bench.rounds({f"cp -r, {larger}": lambda: spawn(["cp", "-r", f"{place}/base", str(out)], bench.home)[0],
                      f"engine, {larger}": lambda: bench.timed("engine", place, out),
                      f"ckpt merge, {larger}": ckpt(bench, "merge", "adapter-1", "--out", str(out))}, Path(place))  # fmt: skip
    return [
        bench.times(f"engine, {larger}", f"cp -r, {larger}", at_most=2.0),
        bench.memory(f"engine, {larger}", 400), bench.memory(f"ckpt merge, {larger}", 400),
    ]  # fmt: skip


SECTIONS = ("memory", "litgpt", "disk", "fingerprint", "plan", "ties", "larger")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """All sections that were asked for."""
    bench = Bench(folder, options.repeat, options.layers)
    bench.child("prepare", folder, options.layers)
    sections: dict[str, Callable[[], list[Figure]]] = {
        "memory": lambda: in_memory(bench), "litgpt": lambda: litgpt(bench), "disk": lambda: on_disk(bench, options.disk),
        "fingerprint": lambda: fingerprints(bench), "plan": lambda: planning(bench), "ties": lambda: combining(bench),
    }  # fmt: skip
    figures = [figure for name, run in sections.items() if name in options.only for figure in run()]
    same = against_peft(bench) if "memory" in options.only else None
    base_bytes = sum(path.stat().st_size for path in (folder / "base").iterdir())
    shutil.rmtree(folder / "base")
    if "larger" in options.only:
        figures += three_times_larger(options.folder, options.layers)
    samples = {
        name: {"seconds": [each.seconds for each in found], "peak_bytes": max(each.peak_bytes for each in found)}
        for name, found in bench.samples.items()
    }
    return {"machine": machine(), "base_bytes": base_bytes, "repeat": options.repeat, "folder": str(options.folder), "disk": str(options.disk),
            "against_peft": same, "figures": [{**vars_of(f), "holds": f.holds} for f in figures], "samples": samples}  # fmt: skip


def vars_of(figure: Figure) -> dict[str, object]:
    """A figure's fields."""
    return {name: getattr(figure, name) for name in Figure.__slots__}


def table(report: Mapping[str, object]) -> str:
    """The figures as Markdown."""
    lines = ["| figure | measured | must be | |", "|---|--:|--:|---|"]
    figures: Sequence[Mapping[str, object]] = report["figures"]  # type: ignore[assignment]
    for each in figures:
        bound = f"≤ {each['at_most']:.2f}" if each["at_most"] is not None else f"≥ {each['at_least']:.2f}"
        lines.append(
            f"| {each['name']} | {each['value']:.2f} {each['unit']} | {bound} | {'' if each['holds'] else '**no** '}{each['detail']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="Every figure that the merge engine is held to.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=22, help="of the base model; 22 make 2.2 GB")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="a file system in memory")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    subprocess.run(["sync"], check=False)  # nobody's writes but ours
    with tempfile.TemporaryDirectory(prefix="ckpt-benchmark-", dir=options.folder) as folder:
        report = measure(options, Path(folder))
    print(table(report))
    if found := report["against_peft"]:
        print(f"\nagainst PEFT: {found}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name, *arguments = sys.argv[2:]
        CHILDREN[name](*(int(text) if text.isdigit() else Path(text) for text in arguments))
    else:
        main()
