"""Time to match an adapter with a model and to plan the merge, from made-up headers: no file of such a size is needed for that."""

from __future__ import annotations

import time
from collections import defaultdict

from inputs import ALPHA, RANK, Llama

from registry.formats import resolve
from registry.formats.adapter import Adapter
from registry.manifest import BaseFormat, BaseModel, Fingerprint, Format, Recipe, utc_now
from registry.merge.plan import Inputs, make_plan
from registry.refs import Digest
from registry.tensors import DType, SafetensorsHeader, StoredTensor, TensorSpec, layout_safetensors

_TENSORS_A_FILE = 24


def seconds_to_plan(shape: Llama) -> float:
    """Seconds from the headers of a base and of an adapter on all its linear layers to a plan."""
    base, adapter, heads = _base(shape), _adapter(shape), {}
    files = defaultdict(list)
    for tensor in base.tensors:
        files[tensor.file].append(tensor)
    for file, tensors in files.items():
        raw = layout_safetensors([tensor.spec for tensor in tensors], {"format": "pt"}, file)[0]
        heads[file] = raw, SafetensorsHeader(tensors=tuple(tensors), metadata={"format": "pt"}, file_bytes=0)
    start = time.perf_counter()
    resolution = resolve(adapter, base)
    plan = make_plan(
        Inputs(
            recipe=Recipe(base=base.digest, inputs=()), base=base, resolution=resolution, adapter_files=(), heads=heads
        )
    )
    seconds = time.perf_counter() - start
    if len(plan.computed) != len(shape.linear()):
        raise SystemExit(f"planned {len(plan.computed)} of {len(shape.linear())} layers: {resolution.findings[:3]}")
    return seconds


def _base(shape: Llama) -> BaseModel:
    tensors, at = [], defaultdict(lambda: 8)
    for number, spec in enumerate(shape.tensors()):
        file = f"model-{number // _TENSORS_A_FILE:05}.safetensors"
        tensors.append(StoredTensor(spec, file, at[file]))
        at[file] += spec.size_bytes
    digests = {spec.name: Digest(f"{number:064x}") for number, spec in enumerate(shape.tensors())}
    nothing = Digest("0" * 64)
    return BaseModel(
        name="large", url="/nowhere", in_store=False, format=BaseFormat.SAFETENSORS, arch_version="", config=shape.config(), files=(),
        fingerprint=Fingerprint(architecture=nothing, weights=nothing, tensors=digests), tensors=tuple(tensors), created_at=utc_now(), author="",
    )  # fmt: skip


def _adapter(shape: Llama) -> Adapter:
    tensors, at = [], 8
    for name, (d_out, d_in) in shape.linear().items():
        for letter, size in (("A", (RANK, d_in)), ("B", (d_out, RANK))):
            spec = TensorSpec(f"base_model.model.{name}.lora_{letter}.weight", DType.F32, size)
            tensors.append(StoredTensor(spec, "adapter_model.safetensors", at))
            at += spec.size_bytes
    targets = sorted({name.rpartition(".")[2] for name in shape.linear()})
    return Adapter(
        format=Format.PEFT, method="lora", rank=RANK, alpha=ALPHA, scaling="alpha/r", targets=tuple(targets), base_name="", files=(),
        weights_file="adapter_model.safetensors", tensors=tuple(tensors),
        config={"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets},
    )  # fmt: skip
