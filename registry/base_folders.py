"""Base models as folders: where one that an adapter names may lie, what it is by its bytes, and what to call it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from registry.fingerprint import DigestCache, architecture_digest, digest_tensors, weights_digest
from registry.formats.base_model import RUN_FOLDER, BaseHead
from registry.locations import Location, local_folder
from registry.manifest import BaseModel, Fingerprint
from registry.progress import Progress
from registry.refs import nearest_name

_HUB_SNAPSHOT = re.compile(r"models--(?:(?P<namespace>.+?)--)?(?P<name>.+)/snapshots/[^/]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedBase:
    """A base model that was asked to be recorded; `created` is False when these weights were known."""

    base: BaseModel
    created: bool


def fingerprint_of(
    cache: DigestCache,
    location: Location,
    head: BaseHead,
    progress: Progress,
    what: str = "fingerprinting the base model",
) -> Fingerprint:
    """What a base model is: every tensor is read, unless the cache knows its digest.

    Args:
        cache: digests from before.
        location: the model's folder.
        head: its headers.
        progress: told of the bytes, under the name `what`.
    """
    total = sum(tensor.spec.size_bytes for tensor in head.tensors)
    digests = digest_tensors(location, head.tensors, cache=cache, advance=lambda done: progress(what, done, total))
    return Fingerprint(
        architecture=architecture_digest(head.format, head.config, [tensor.spec for tensor in head.tensors]),
        weights=weights_digest(digests),
        tensors=digests,
    )


def name_of_place(url: str) -> str:
    """What a base model is called by where it lies."""
    if match := _HUB_SNAPSHOT.search(url):
        return "/".join(part for part in (match["namespace"], match["name"]) if part)
    parent, _, name = url.rstrip("/").rpartition("/")
    if RUN_FOLDER.fullmatch(name):  # what many runs call a step says less than which run it is of
        run = parent.rpartition("/")[2]
        name = run if name == "final" else f"{run}-{name}"
    return str(nearest_name(name, "base"))


def places_of_base(name: str, near: str, hub_cache: Path) -> Iterator[Path]:
    """Where a base model called so may lie: a path from here or from around the adapter, in litgpt's `checkpoints/`, in the Hub's cache."""
    folder = local_folder(near)
    parents = [folder, *list(folder.parents)[:3]] if folder is not None else []
    for start in (Path.cwd(), *parents):
        for place in (start / name, start / "checkpoints" / name):
            if os.path.isdir(place):  # unlike Path.is_dir, false for a name that is too long
                yield place
    main = hub_cache / f"models--{name.replace('/', '--')}" / "refs" / "main"
    if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name) and os.path.isfile(main):
        yield main.parents[1] / "snapshots" / main.read_text(encoding="utf-8").strip()
