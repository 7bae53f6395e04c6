"""Domain values for tests: everything has a default, a test names what it is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from blake3 import blake3

from registry.manifest import Checkpoint, FileEntry, Format, Manifest, Metric
from registry.refs import AdapterName, Digest

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)


def digest(text: str) -> Digest:
    """The digest of a text: equal texts give equal digests."""
    return Digest(blake3(text.encode()).hexdigest())


def metrics(values: Mapping[str, float]) -> tuple[Metric, ...]:
    """Metrics from names and values."""
    return tuple(Metric(name=name, value=value) for name, value in values.items())


def manifest(**changes: Any) -> Manifest:
    """A LoRA adapter of PEFT, rank 8; `size_bytes` sets the size of its one file."""
    size_bytes = changes.pop("size_bytes", 1000)
    entry = FileEntry(path="adapter_model.safetensors", size_bytes=size_bytes, digest=digest("weights"))
    defaults: dict[str, Any] = {
        "format": Format.PEFT,
        "method": "lora",
        "rank": 8,
        "alpha": 16.0,
        "scaling": "alpha/r",
        "targets": ("q_proj", "v_proj"),
        "dtype": "float32",
        "parameters": 250,
        "tensors": 4,
        "weights_file": entry.path,
        "base_name": "meta/base",
        "files": (entry,),
    }
    return Manifest(**{**defaults, **changes})


_MANIFEST_FIELDS = {field.name for field in fields(Manifest)} - {field.name for field in fields(Checkpoint)}


def checkpoint(**changes: Any) -> Checkpoint:
    """Version 1 of `support-bot` at step 100.

    Takes the fields of Checkpoint, and of its Manifest (`rank=16`, `size_bytes=5`). The adapter may be text, metrics a mapping of values.
    The digest follows from adapter and version.
    """
    inside = {name: changes.pop(name) for name in {*_MANIFEST_FIELDS, "size_bytes"} & changes.keys()}
    adapter, version = changes.pop("adapter", "support-bot"), changes.pop("version", 1)
    measured = changes.pop("metrics", ())
    defaults: dict[str, Any] = {
        "digest": digest(f"{adapter}@v{version}"),
        "base": digest("base"),
        "base_name": "meta/base",
        "architecture": digest("architecture"),
        "arch_version": "",
        "run": "run-1",
        "step": 100,
        "source": "/training/run-1/checkpoint-100",
        "created_at": NOON,
        "author": "ada",
    }
    return Checkpoint(
        adapter=AdapterName.parse(adapter) if isinstance(adapter, str) else adapter,
        version=version,
        metrics=metrics(measured) if isinstance(measured, Mapping) else tuple(measured),
        **{"manifest": manifest(**inside), **defaults, **changes},
    )
