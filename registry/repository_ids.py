"""What the id of a repository and its revision mean, as clients of the Hugging Face Hub ask for them. Reads the catalog only.

    support-bot                an adapter; its revisions are main (the newest, unless an alias is called so), and whatever may follow the `@`
                               of a reference, the beginning of a digest, or a commit
    support-bot-merged         what merging each of its checkpoints alone into its base model gives, with the same revisions
    support-bot-v3             one version of it, and
    support-bot-v3-merged      what merging that gives: for who can name no revision
    tiny-llama                 a base model; so is base-1f0c6a7be2d4, by the beginning of its weights' digest
    merged-9a3fb2c41d70        what a recipe makes, by the beginning of the recipe's digest

An id that means two things is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import final

from blake3 import blake3

from registry.db.catalog import Catalog
from registry.db.listing import Scope
from registry.db.lookup import near
from registry.db.repositories import KnownBase
from registry.errors import (
    Ambiguous,
    Conflict,
    InvalidReference,
    UnknownCheckpoint,
    UnknownRepository,
    UnknownRevision,
)
from registry.manifest import BaseFile, Checkpoint, Recipe, RecipeInput, canonical_json
from registry.merge.methods import checked
from registry.refs import AdapterName, CheckpointRef, Digest
from registry.results import KeptRecipe, RepositoryKind

MAIN = "main"
MERGED = "-merged"
_COMMIT_DIGITS, _INPUT_DIGITS = 40, 28
COMMIT = re.compile(r"[0-9a-f]{40}")
_HEX = re.compile(r"[0-9a-f]{6,64}")
_VERSION = re.compile(r"(.+)-v([1-9][0-9]{0,8})")
_BY_DIGEST = re.compile(r"(base|merged)-([0-9a-f]{12,64})")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What an id means: an adapter (one version of it) as it is or merged, a base model, or a recipe's model.

    `words` say it to people, with `only`, how to ask for nothing but this.
    """

    kind: RepositoryKind
    words: str
    only: str
    adapter: AdapterName | None = None
    version: int | None = None
    base: KnownBase | None = None
    recipe: KeptRecipe | None = None


def meaning(catalog: Catalog, id_: str, namespaces: Sequence[str] = ()) -> Meaning:
    """The one thing that an id means to whoever sees some namespaces.

    Raises:
        UnknownRepository: nothing.
        Conflict: several things; names them, and ids that mean one of them.
        Ambiguous: the beginning of a digest that fits several.
    """
    found = [
        *_of_adapters(catalog, id_, namespaces),
        *_base_models(catalog, id_),
        *_of_recipes(catalog, id_, namespaces),
    ]
    if not found:
        known = catalog.overview.names(500, namespaces)
        raise UnknownRepository(
            id_, near(id_, [*known, *(f"{name}{MERGED}" for name in known), *catalog.bases.names()])
        )
    if len(found) > 1:
        meant = " or ".join(f"{each.words} (ask for {each.only})" for each in found)
        raise Conflict(f"repository {id_}", f"it means {meant}")
    return found[0]


def _of_adapters(catalog: Catalog, id_: str, namespaces: Sequence[str]) -> Iterator[Meaning]:
    for text, version, is_merged in _readings(id_):
        try:
            name = AdapterName.parse(text)
        except InvalidReference:
            continue
        if catalog.repositories.has_adapter(name, namespaces, version):
            yield _of_adapter(name, version, is_merged=is_merged)


def _readings(id_: str) -> Iterator[tuple[str, int | None, bool]]:
    """The adapters that an id could be about, with a version or without, as they are or merged."""
    stem = id_.removesuffix(MERGED)
    for text, is_merged in ((id_, False), *(((stem, True),) if stem != id_ else ())):
        yield text, None, is_merged
        if match := _VERSION.fullmatch(text):
            yield match[1], int(match[2]), is_merged


def _of_adapter(name: AdapterName, version: int | None, *, is_merged: bool) -> Meaning:
    suffix, merged = (MERGED, "the merged model of ") if is_merged else ("", "")
    if version is None:
        words, only = f"{merged}the adapter {name}", f"{name}-vN{suffix}, N being a version"
    else:
        words, only = f"{merged}version {version} of {name}", f"{name}{suffix} with revision v{version}"
    kind: RepositoryKind = "merged" if is_merged else "adapter"
    return Meaning(kind=kind, words=words, only=only, adapter=name, version=version)


def _base_models(catalog: Catalog, id_: str) -> Iterator[Meaning]:
    found = catalog.repositories.bases_named(id_)
    if (match := _BY_DIGEST.fullmatch(id_)) and match[1] == "base":
        found += catalog.repositories.bases_starting(match[2])
    for base in {each.digest: each for each in found}.values():
        only = f"base-{base.digest.short}"
        yield Meaning(kind="base", words=f"the base model {base.name}", only=only, base=base)


def _of_recipes(catalog: Catalog, id_: str, namespaces: Sequence[str]) -> Iterator[Meaning]:
    match = _BY_DIGEST.fullmatch(id_)
    if match is None or match[1] != "merged":
        return
    found = {each.recipe.digest: each for each in recipes(catalog, match[2]) if is_seen(each.checkpoints, namespaces)}
    if len(found) > 1:
        raise Ambiguous(id_, [f"merged-{digest.hex}" for digest in sorted(found)])
    for digest, kept in found.items():
        yield Meaning(kind="merged", words="the model of a recipe", only=f"merged-{digest.hex}", recipe=kept)


def recipes(catalog: Catalog, prefix: str) -> list[KeptRecipe]:
    """The recipes whose digests begin with some hex digits: those that are kept, and those that were carried out."""
    kept = catalog.recipes.starting(prefix)
    known = {each.recipe.digest for each in kept}
    return [
        *kept,
        *(
            KeptRecipe(
                recipe=each.recipe,
                base=each.base_name,
                checkpoints=each.checkpoints,
                note=each.note,
                created_at=each.created_at,
                author=each.author,
                merged=each.digest,
            )
            for each in catalog.merged.of_recipes(prefix)
            if each.recipe.digest not in known
        ),
    ]


def is_seen(checkpoints: Sequence[str], namespaces: Sequence[str]) -> bool:
    """Whether whoever sees some namespaces (none: all) sees all of some checkpoints."""
    return not namespaces or all(
        AdapterName.parse(ref.partition("@")[0]).namespace in namespaces for ref in checkpoints
    )


# -- revisions


def checkpoint_at(catalog: Catalog, id_: str, found: Meaning, revision: str) -> Checkpoint:
    """The checkpoint of an adapter that a revision means. Of a merged model's commit, only the part that names it is looked at.

    Raises:
        UnknownRevision: none; carries similar ones.
        Ambiguous: the beginning of a digest that fits several.
        UnknownMetric, DirectionUnknown: the best cannot be told.
    """
    adapter = found.adapter
    if adapter is None:
        raise UnknownRevision(f"{id_}@{revision}")
    digits = _INPUT_DIGITS if found.kind == "merged" else _COMMIT_DIGITS
    if COMMIT.fullmatch(revision) and (named := _starting(catalog, adapter, revision[:digits])):
        if found.version in (None, named.version):
            return named
    elif found.version is not None:
        if revision == MAIN:
            return catalog.checkpoints.resolve(CheckpointRef(adapter, "version", str(found.version)))
    elif resolved := _named(catalog, adapter, revision):
        return resolved
    raise UnknownRevision(f"{id_}@{revision}", _similar(catalog, adapter, revision, found.version))


def _named(catalog: Catalog, adapter: AdapterName, revision: str) -> Checkpoint | None:
    if revision == MAIN and not catalog.repositories.has_label(adapter, MAIN):
        return catalog.checkpoints.resolve(CheckpointRef(adapter))
    try:
        ref = CheckpointRef.parse(f"{adapter}@{revision}")
        if ref.selector == "best":
            return catalog.checkpoints.rank(Scope(adapter), metric=ref.value or None).groups[0].checkpoints[0]
        return catalog.checkpoints.resolve(ref)
    except InvalidReference:
        return None
    except UnknownCheckpoint:
        return _starting(catalog, adapter, revision) if _HEX.fullmatch(revision) else None


def _starting(catalog: Catalog, adapter: AdapterName, prefix: str) -> Checkpoint | None:
    """The checkpoint of an adapter whose digest begins so."""
    found = catalog.repositories.versions_starting(adapter, prefix)
    versions = [CheckpointRef(adapter, "version", str(each)) for each in found]
    if len(versions) > 1:
        raise Ambiguous(prefix, [str(each) for each in versions])
    return catalog.checkpoints.resolve(versions[0]) if versions else None


def _similar(catalog: Catalog, adapter: AdapterName, revision: str, version: int | None) -> list[str]:
    if version is not None:
        return [MAIN]
    return near(revision, [MAIN, *(each.name for each in catalog.repositories.names(adapter))])


def check_base_revision(
    catalog: Catalog, id_: str, base: KnownBase, revision: str, namespaces: Sequence[str] = ()
) -> None:
    """See that a base model answers to a revision: main, its commit, or what an adapter trained on it answers to.

    transformers passes the revision that an adapter was asked for with on to its base model.

    Raises:
        UnknownRevision: it does not.
    """
    if revision in (MAIN, base_commit(base.digest, base.files)):
        return
    wanted = []
    with suppress(InvalidReference):
        wanted.append(CheckpointRef.parse(f"adapter@{revision}"))
    if _HEX.fullmatch(revision):
        wanted.append(CheckpointRef(digest_prefix=revision))
    if not any(catalog.repositories.answers(base.digest, each, namespaces) for each in wanted):
        raise UnknownRevision(f"{id_}@{revision}", [MAIN])


# -- commits: 40 hex digits that name the same bytes for ever


def adapter_commit(checkpoint: Digest) -> str:
    """Of a checkpoint: the beginning of its digest."""
    return checkpoint.hex[:_COMMIT_DIGITS]


def base_commit(weights: Digest, files: Sequence[BaseFile]) -> str:
    """Of a base model: its weights, and its files as they are now."""
    return name_of([weights.hex, [[each.path, each.size_bytes, each.identity] for each in files]])


def merged_commit(named_by: Digest, recipe: Digest, base: str) -> str:
    """Of a merged model.

    Args:
        named_by: the checkpoint it is looked up by, or the recipe.
        recipe: what makes it.
        base: the base model's commit.
    """
    return named_by.hex[:_INPUT_DIGITS] + name_of([recipe.hex, base])[: _COMMIT_DIGITS - _INPUT_DIGITS]


def names_merged(commit: str, recipe: Digest, base: str) -> bool:
    """Whether a commit is that of a recipe on a base model with this commit."""
    return commit[_INPUT_DIGITS:] == name_of([recipe.hex, base])[: _COMMIT_DIGITS - _INPUT_DIGITS]


def name_of(value: object) -> str:
    """40 hex digits for a value."""
    return blake3(canonical_json(value)).hexdigest(_COMMIT_DIGITS // 2)


def recipe_alone(base: Digest, checkpoint: Digest) -> Recipe:
    """What merges a checkpoint alone into its base model, as it is."""
    inputs = (RecipeInput(checkpoint=checkpoint),)
    return Recipe(base=base, inputs=inputs, method="linear", options=checked("linear", (1.0,), {}))
