"""What a merged model was made of, and how, as an in-toto statement with a SLSA provenance (version 1). Pure.

`ckptContent` and `ckptWeights` are digests of the registry's own: of a checkpoint, BLAKE3 over the paths and digests of its files; of a base
model, its fingerprint, BLAKE3 over the digests of its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from registry.manifest import BaseModel, Checkpoint, FileEntry, Merged, to_json

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:ckpt-registry:merge:v1"
BUILDER = "urn:ckpt-registry:merge-engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """All that a statement says.

    `files` are the merged model's, each with its SHA-256. `inputs` are the recipe's checkpoints, in its order. `tools` are the versions of what
    made it. `began_at` is None where nobody wrote it down.
    """

    merged: Merged
    files: Sequence[FileEntry]
    base: BaseModel
    inputs: Sequence[Checkpoint]
    tools: Mapping[str, str]
    began_at: datetime | None = None


def make_statement(making: Making) -> dict[str, Any]:
    """The statement, as JSON."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": entry.path, "digest": _digests(entry)}
            for entry in sorted(making.files, key=lambda entry: entry.path)
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"buildDefinition": _definition(making), "runDetails": _run(making)},
    }


def _definition(making: Making) -> dict[str, Any]:
    recipe = making.merged.recipe
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": {
            "method": recipe.method,
            "options": to_json(recipe.options),
            "dtype": to_json(recipe.dtype),
            "base": {"name": making.base.name, "weights": str(recipe.base)},
            "inputs": [
                {"checkpoint": checkpoint.ref, "content": str(item.checkpoint), "weight": item.weight}
                for checkpoint, item in zip(making.inputs, recipe.inputs, strict=True)
            ],
        },
        "internalParameters": {"formula": recipe.formula},
        "resolvedDependencies": [_base(making.base), *(each for item in making.inputs for each in _input(item))],
    }


def _base(base: BaseModel) -> dict[str, Any]:
    fingerprint = base.fingerprint
    return {
        "name": base.name,
        "digest": {"ckptWeights": fingerprint.weights.hex},
        "annotations": {"architecture": str(fingerprint.architecture), "arch_version": base.arch_version},
    }


def _input(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    whole = {"name": checkpoint.ref, "digest": {"ckptContent": checkpoint.digest.hex}}
    files = [
        {"name": f"{checkpoint.ref}/{entry.path}", "digest": _digests(entry)} for entry in checkpoint.manifest.files
    ]
    return [whole, *files]


def _digests(entry: FileEntry) -> dict[str, str]:
    return {**({"sha256": entry.sha256} if entry.sha256 else {}), "blake3": entry.digest.hex}


def _run(making: Making) -> dict[str, Any]:
    began = {"startedOn": to_json(making.began_at)} if making.began_at else {}
    return {
        "builder": {"id": BUILDER, "version": dict(making.tools)},
        "metadata": {
            "invocationId": str(making.merged.recipe.digest),
            **began,
            "finishedOn": to_json(making.merged.created_at),
        },
    }
