"""Adapter formats: find checkpoints in a folder, read them, match them with a base model. Told apart by content, never by a flag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from registry.changes import Resolution
from registry.errors import NotACheckpoint, UnreadableFile
from registry.formats.adapter import Adapter, Found
from registry.formats.findings import unsupported
from registry.formats.litgpt import is_litgpt, places_in_litgpt, read_litgpt
from registry.formats.peft import is_peft, places_in_peft, read_peft
from registry.formats.quantised import base_quantised, stored_quantised
from registry.locations import Location
from registry.manifest import BaseModel, Format

__all__ = ["Adapter", "Found", "Search", "find_checkpoints", "read_adapter", "resolve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """The checkpoints of a place, oldest first, and those of a run that are there but damaged (a killed run leaves its last one so)."""

    found: tuple[Found, ...]
    unreadable: tuple[UnreadableFile, ...] = ()


def find_checkpoints(location: Location) -> Search:
    """The checkpoint that a folder is, or every checkpoint of the run that it holds.

    Raises:
        NotACheckpoint: neither.
        CorruptFile, UnsafePickle: the only checkpoint there is damaged or dangerous.
    """
    files = location.files()
    places = places_in_peft(location, files) or places_in_litgpt(location, files)
    if not places:
        reason = "no adapter_config.json and no lit_model.pth.lora, .adapter or .adapter_v2, here or one level below"
        raise NotACheckpoint(location.url, "an empty folder" if not files else reason)
    found, unreadable = [], []
    for url, read in places.items():
        try:
            found.append(read())
        except UnreadableFile as error:
            is_whole = error.path.startswith(url)
            unreadable.append(error if is_whole else type(error)(f"{url}/{error.path}", error.reason))
    if not found:
        raise unreadable[0]
    return Search(found=tuple(found), unreadable=tuple(unreadable))


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
    """Match an adapter's tensors with a base model's, from headers alone. With a quantised base nothing is compared."""
    if quantised := stored_quantised(base):
        return Resolution(changes=(), findings=(base_quantised(base, quantised),))
    found = _resolver(adapter.format)(adapter, base)
    odd = [change.target for change in found.changes if not change.target.dtype.is_mergeable]
    refusals = [
        unsupported("base_dtype", spec.name, found=spec.dtype.long_name, advice="merge into a base with 16 or 32 bit weights")
        for spec in odd
    ]  # fmt: skip
    return replace(found, findings=(*found.findings, *refusals))


def _resolver(format: Format) -> Callable[[Adapter, BaseModel], Resolution]:
    """Each resolver brings its own modules along, and a command seldom needs both."""
    if format is Format.PEFT:
        from registry.formats.peft_resolve import resolve_peft  # noqa: PLC0415

        return resolve_peft
    from registry.formats.litgpt_resolve import resolve_litgpt  # noqa: PLC0415

    return resolve_litgpt
