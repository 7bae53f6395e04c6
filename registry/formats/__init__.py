"""Adapter formats: find checkpoints in a folder, read them, match them with a base model. Told apart by content, never by a flag."""

from __future__ import annotations

from registry.changes import Resolution
from registry.errors import NotACheckpoint
from registry.formats.adapter import Adapter, Found
from registry.formats.litgpt import find_litgpt, is_litgpt, read_litgpt
from registry.formats.litgpt_resolve import resolve_litgpt
from registry.formats.peft import find_peft, is_peft, read_peft
from registry.formats.peft_resolve import resolve_peft
from registry.locations import Location
from registry.manifest import BaseModel, Format

__all__ = ["Adapter", "Found", "find_checkpoints", "read_adapter", "resolve"]


def find_checkpoints(location: Location) -> list[Found]:
    """The checkpoint that a folder is, or every checkpoint of the run that it holds, oldest first.

    Raises:
        NotACheckpoint: neither.
        CorruptFile, UnsafePickle: a checkpoint's file is damaged or dangerous.
    """
    files = location.files()
    found = find_peft(location, files) or find_litgpt(location, files)
    if not found:
        reason = "no adapter_config.json and no lit_model.pth.lora, .adapter or .adapter_v2, here or one level below"
        raise NotACheckpoint(location.url, "an empty folder" if not files else reason)
    return found


def read_adapter(location: Location) -> Adapter:
    """The adapter in a folder.

    Raises:
        NotACheckpoint, CorruptFile, UnsafePickle: as for `find_checkpoints`.
    """
    files = location.files()
    if is_peft(files):
        return read_peft(location)
    if is_litgpt(files):
        return read_litgpt(location)
    raise NotACheckpoint(location.url, "no adapter_config.json and no lit_model.pth.lora, .adapter or .adapter_v2")


def resolve(adapter: Adapter, base: BaseModel) -> Resolution:
    """Match an adapter's tensors with a base model's, from headers alone."""
    return resolve_peft(adapter, base) if adapter.format is Format.PEFT else resolve_litgpt(adapter, base)
