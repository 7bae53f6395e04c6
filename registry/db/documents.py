"""The bulk of a base model as a JSON document, and back. Other documents inside rows are read by `registry.codec`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from registry.manifest import BaseFile, BaseModel, to_json
from registry.refs import Digest
from registry.tensors import DType, StoredTensor, TensorSpec


def base_document(base: BaseModel) -> dict[str, Any]:
    """The bulky parts of a base model."""
    return {
        # Text inside the document: some models' config.json has Infinity, which PostgreSQL's JSON does not take
        "config": json.dumps(to_json(base.config)),
        "files": to_json(base.files),
        "tensors": [[t.spec.name, t.spec.dtype.value, [*t.spec.shape], t.file, t.offset_bytes] for t in base.tensors],
        "digests": {name: digest.hex for name, digest in base.fingerprint.tensors.items()},
    }


def base_parts_from(document: Mapping[str, Any]) -> dict[str, Any]:
    """What `base_document` wrote down, as the fields `config`, `files` and `tensors` of a base model."""
    return {
        "config": json.loads(document["config"]),
        "files": tuple(BaseFile(**entry) for entry in document["files"]),
        "tensors": tuple(
            StoredTensor(TensorSpec(name, DType(dtype), tuple(shape)), file, offset)
            for name, dtype, shape, file, offset in document["tensors"]
        ),
    }


def tensor_digests_from(document: Mapping[str, Any]) -> dict[str, Digest]:
    """The digest of each tensor of a base model."""
    return {name: Digest(text) for name, text in document["digests"].items()}
