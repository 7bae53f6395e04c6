"""Heads for a task (classes of texts or of tokens, answers in a text) that were trained whole, on a base whose files have none.

The merged model is one for that task: it has the new head instead of the one that predicts tokens, and its configuration says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

from registry.changes import Change, Resolution
from registry.formats.adapter import Adapter
from registry.formats.base_model import find_embeddings
from registry.manifest import BaseModel
from registry.tensors import DType, StoredTensor, TensorSpec

# By PEFT's `task_type`: the names of heads that PEFT lists in `modules_to_save` by itself, of which a model has one; and the classes' ending.
_TASKS = {
    "SEQ_CLS": (("classifier", "score"), "ForSequenceClassification"),
    "TOKEN_CLS": (("classifier", "score"), "ForTokenClassification"),
    "QUESTION_ANS": (("qa_outputs",), "ForQuestionAnswering"),
}
_OTHER_CLASS = re.compile(
    r"(\w+?)(?:ForCausalLM|LMHeadModel|ForMaskedLM|ForPreTraining|ForConditionalGeneration|Model)"
)
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.default)?|original_module)(?=\.)")
_DEFAULT_LABELS = 2


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TaskHead:
    """What an adapter has of a head that the base lacks: by the name that each tensor gets in the result."""

    base: BaseModel
    names: tuple[str, ...] = ()
    class_ending: str = ""
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter, base: BaseModel) -> TaskHead:
        """Find the new head among an adapter's tensors."""
        heads, ending = _TASKS.get(str(adapter.config.get("task_type")), ((), ""))
        saved = adapter.config.get("modules_to_save")
        names = tuple(name for name in heads if isinstance(saved, list) and name in saved)
        known = {tensor.spec.name for tensor in base.tensors}
        found = {
            path: tensor
            for tensor in adapter.tensors
            if (path := _path(tensor)) not in known and not set(names).isdisjoint(path.split(".")[:-1])
            if ".original_module." not in tensor.spec.name
        }
        return cls(base=base, names=names, class_ending=ending, tensors=found)

    def without(self, adapter: Adapter) -> Adapter:
        """The adapter without the head, and without the names of heads that its file does not have."""
        own = {_path(tensor) for tensor in adapter.tensors}
        saved, absent = adapter.config.get("modules_to_save"), list[str]()
        if any(_is_of(path, name) for path in own for name in self.names):
            kept = own - self.tensors.keys()
            absent = [name for name in self.names if not any(_is_of(path, name) for path in kept)]
        if not absent or not isinstance(saved, list):
            return adapter
        return replace(
            adapter,
            tensors=tuple(tensor for tensor in adapter.tensors if _path(tensor) not in self.tensors),
            config={**adapter.config, "modules_to_save": [name for name in saved if name not in absent]},
        )

    def complete(self, found: Resolution) -> Resolution:
        """Add the head to what the rest of the adapter changes."""
        if not self.tensors:
            return found
        dtype = _common_dtype(self.base)
        added = tuple(
            Change(target=TensorSpec(name, dtype, tensor.spec.shape), replacement=tensor)
            for name, tensor in self.tensors.items()
        )
        embeddings = find_embeddings(self.base)
        old_head = {embeddings.head_name} & {each.spec.name for each in self.base.tensors} if embeddings else set()
        return replace(
            found,
            changes=(*found.changes, *added),
            config={**found.config, **self._fields()},
            removed=found.removed | old_head,
        )

    def _fields(self) -> dict[str, object]:
        fields: dict[str, object] = {}
        classes = self.base.config.get("architectures")
        if isinstance(classes, list) and classes and (match := _OTHER_CLASS.fullmatch(str(classes[0]))):
            fields["architectures"] = [match[1] + self.class_ending]
        count = [tensor.spec.shape[0] for name, tensor in self.tensors.items() if name.endswith(".weight")][-1:]
        if count and count[0] != self._labels(self.base.config):
            fields["id2label"] = {str(label): f"LABEL_{label}" for label in range(count[0])}
            fields["label2id"] = {f"LABEL_{label}": label for label in range(count[0])}
        return fields

    @staticmethod
    def _labels(config: Mapping[str, Any]) -> int:
        labels = config.get("id2label")
        return len(labels) if isinstance(labels, dict) else int(config.get("num_labels") or _DEFAULT_LABELS)


def _path(tensor: StoredTensor) -> str:
    return _SAVED.sub("", tensor.spec.name.removeprefix("base_model.model."))


def _is_of(path: str, name: str) -> bool:
    return name in path.split(".")[:-1]


def _common_dtype(base: BaseModel) -> DType:
    """The dtype of most of the base's values: training loaded the whole model in it."""
    sizes: dict[DType, int] = {}
    for tensor in base.tensors:
        if tensor.spec.dtype.is_mergeable:
            sizes[tensor.spec.dtype] = sizes.get(tensor.spec.dtype, 0) + tensor.spec.elements
    return max(sizes, key=lambda dtype: sizes[dtype], default=DType.F32)
