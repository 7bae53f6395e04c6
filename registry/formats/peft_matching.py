"""What every PEFT method needs to match an adapter with a base model: names, whole tensors, targets, embeddings, and the findings about them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import final

from registry.changes import Change, Resolution, Step
from registry.formats.adapter import spec_like
from registry.formats.base_model import find_embeddings
from registry.formats.experts import Layout
from registry.formats.findings import ANOTHER_SAVE, OTHER_BASE, misfit, warning
from registry.formats.peft import CONFIG_FILE
from registry.formats.peft_config import Scope, names_of
from registry.formats.peft_embeddings import settle
from registry.formats.peft_keys import Keys, plain_path
from registry.formats.peft_names import Names, Neighbours, is_in_expert, match_names
from registry.manifest import BaseModel, Finding
from registry.tensors import StoredTensor

# Architectures of transformers whose linear layers are Conv1D, which stores its weight as [d_in, d_out].
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


def is_conv1d(model_type: str, module: str) -> bool:
    """Whether a layer of such a model stores its weight as `[d_in, d_out]`."""
    return model_type in _CONV1D_MODELS and module.rsplit(".", 1)[-1] in _CONV1D_LAYERS


@final
class Matching:
    """One matching, as it grows: `changes` by the name of their target, and `findings`.

    Module paths are the training-time ones, `base_layer` and all, until `name` turns them into names of base tensors.
    """

    def __init__(
        self, keys: Keys, scope: Scope, base: BaseModel, tensors: Mapping[str, StoredTensor] | None = None
    ) -> None:
        """`tensors`: of the model that was trained, by name, where they are not simply the base's."""
        own = {tensor.spec.name: tensor for tensor in base.tensors}
        self.base: Mapping[str, StoredTensor] = own if tensors is None else tensors
        self.changes: dict[str, Change] = {}
        self.findings: list[Finding] = [*keys.findings, *scope.findings()]
        self._keys, self._scope = keys, scope
        self.model_type = str(base.config.get("model_type", ""))
        self.embeddings = find_embeddings(base)
        self.tied_head = self.embeddings.head_name if self.embeddings and self.embeddings.tied else ""
        found = match_names(keys.modules, self.base, model_type=self.model_type, tied_head=self.tied_head)
        self.names = found or Names()
        self.layout = Layout(self.base)
        self._neighbours: Neighbours | None = None

    # -- names

    def name(self, module: str, kind: str = "weight") -> str:
        """The base tensor that a module's parameter is, whether the base has it or not."""
        return f"{self.names.to_base(plain_path(module))}.{kind}"

    def is_transposed(self, module: str) -> bool:
        """Whether a layer's weight is stored as `[d_in, d_out]`: by layer type, as in PEFT; the flag only speaks for unknown architectures."""
        if self.model_type:
            return is_conv1d(self.model_type, module)
        return self._scope.is_transposed

    # -- changes

    def change(self, module: str, tensor: StoredTensor, kind: str = "weight") -> Change | None:
        """The change so far of the base tensor that a parameter is; None, with a finding about `tensor`, when the base has no such tensor."""
        return self.change_of(self.name(module, kind), tensor)

    def change_of(self, name: str, tensor: StoredTensor) -> Change | None:
        """The same by the base tensor's name."""
        if name in self.changes:
            return self.changes[name]
        source = self.source(name)
        if source is None:
            self._no_base_tensor(tensor, name)
            return None
        return Change(target=spec_like(source.spec, name=name), source=source)

    def source(self, name: str) -> StoredTensor | None:
        """The base's tensor of a name, of a tied head the input embedding; None when there is none."""
        if self.embeddings and name == self.tied_head:
            return self.base[self.embeddings.input_name]
        return self.base.get(name)

    def add(self, change: Change, *steps: Step) -> None:
        """Record a change with these steps after its own."""
        self.changes[change.target.name] = replace(change, steps=(*change.steps, *steps))

    def replace_whole(self) -> None:
        """Make a replacement of every tensor that was saved whole. Comes before any step."""
        for (module, kind), tensor in self._keys.whole.items():
            name, found = self.name(module, kind), self.embeddings
            is_embedding = found is not None and name in (found.input_name, found.head_name)
            is_bias = "bias" in kind and self._scope.bias != "none"
            if not (self._scope.saves(module) or is_bias or is_embedding):
                self.unused(tensor)
                continue
            for place, part in self.layout.split(name, tensor):
                if change := self.change_of(place, tensor):
                    self.replace(change, part, may_grow=is_embedding)

    def replace(self, change: Change, tensor: StoredTensor, *, may_grow: bool = False) -> None:
        """Record that a tensor replaces the base's. `may_grow`: it may have more rows."""
        grows = may_grow and _grows(change.target.shape, tensor.spec.shape)
        if tensor.spec.shape != change.target.shape and not grows:
            self.wrong_shape(tensor, change.target.shape)
            return
        target = replace(change.target, shape=tensor.spec.shape)
        self.changes[target.name] = replace(change, target=target, replacement=tensor)

    def finish(
        self, trained: Collection[str], config: Mapping[str, object] | None = None, *, least_dimensions: int = 2
    ) -> Resolution:
        """Account for what is left, check the targets, settle the embeddings.

        Args:
            trained: training-time paths of the modules that have parameters of their own.
            config: fields of the base's configuration that change because of the tuner.
            least_dimensions: that a weight has to have for its module to be a target: 2, or 1 where norms are, too.
        """
        for tensor in (*self._keys.other, *self._keys.shared.values()):
            self.unused(tensor)
        self._check_targets(trained, least_dimensions)
        fields = {**(config or {}), **self._settle_embeddings()}
        return Resolution(changes=tuple(self.changes.values()), findings=tuple(self.findings), config=fields)

    def _settle_embeddings(self) -> dict[str, object]:
        found = self.embeddings
        if found is None:
            return {}
        settled = settle(self.changes, found, self.base, self._scope)
        for name in (found.input_name, found.head_name):
            self.changes.pop(name, None)
        self.changes.update(settled.changes)
        self.findings += settled.findings
        return dict(settled.config)

    # -- targets

    def _check_targets(self, trained: Collection[str], least_dimensions: int) -> None:
        """Every targeted module of the base has parameters, and no other has: half an adapter is no adapter."""
        scope, modules, trained = self._scope, list(self._base_modules(least_dimensions)), dict.fromkeys(trained)
        missed = [module for module in modules if module not in trained and scope.targets_module(module)]
        if not any(map(is_in_expert, trained)):
            missed = self._pass_over_experts(missed)
        for module in missed:
            self.missed(module, "parameters for every targeted module")
        for module in trained:
            is_tied_head = scope.ties_weights and self.name(module) == self.tied_head
            if scope.targets_module(module) is False and not is_tied_head:
                self.unused(self._keys.first(module))
        self._check_names([*modules, *trained, self.tied_head.removesuffix(".weight")])
        if not self._keys.parts and not self._keys.whole and not self._keys.rows:
            self.findings.append(
                misfit("nothing_matched", "adapter", expected="parameters of the adapter", found="none in the file")
            )

    def _pass_over_experts(self, missed: Sequence[str]) -> list[str]:
        """Since transformers 5 a layer's experts are no modules, so that `target_modules` does not reach them."""
        inside = [module for module in missed if is_in_expert(module)]
        if inside:
            expected = f"parameters for {len(inside)} modules of experts, if target_modules reached them"
            advice = "right if trained with transformers 5, where experts are targeted by target_parameters"
            self.findings.append(
                warning("experts_untouched", inside[0], expected=expected, found="none in the file", advice=advice)
            )
        return [module for module in missed if not is_in_expert(module)]

    def _check_names(self, modules: Sequence[str]) -> None:
        for name in self._scope.saved_modules:
            if not any(f"{name}." in f"{module}." for module, _ in self._keys.whole):
                self.missed(name, "a saved copy of this module")
        known = set[str]().union(*map(names_of, modules))
        for name in self._scope.targets.names:
            if name not in known:
                self.findings.append(
                    warning("target_unused", CONFIG_FILE, expected="a module of this name", found=f"target_modules: {name!r}",
                            advice="neither base nor adapter has one, so training passed over it too")
                )  # fmt: skip

    def _base_modules(self, least_dimensions: int) -> Iterator[str]:
        """The base's modules with a weight of so many dimensions, by their training-time paths."""
        for name, tensor in self.base.items():
            path = name.removesuffix(".weight").removesuffix(".in_proj_weight")  # of nn.MultiheadAttention
            if path != name and len(tensor.spec.shape) >= least_dimensions:
                module = self.names.to_training(path)
                if module is not None:
                    yield module

    # -- findings

    def refuse(self, code: str, where: str, *, expected: str, found: str, advice: str = "") -> None:
        """A finding that says that adapter and base do not belong together."""
        self.findings.append(misfit(code, where, expected=expected, found=found, advice=advice))

    def missed(self, where: str, expected: str) -> None:
        """Something is not in the file that must be."""
        self.refuse("target_missed", where, expected=expected, found="none in the file",
                    advice="the adapter is incomplete, or was trained on another model")  # fmt: skip

    def unused(self, tensor: StoredTensor) -> None:
        """Something is in the file that nothing calls for."""
        self.refuse("unused_tensor", tensor.spec.name, expected="nothing that the configuration does not call for",
                    found=f"shape {list(tensor.spec.shape)}", advice=f"{ANOTHER_SAVE}, or PEFT is newer")  # fmt: skip

    def wrong_shape(self, tensor: StoredTensor, expected: Sequence[int], found: str = "") -> None:
        """A tensor, or what is made of it, has not the base's shape."""
        self.refuse("shape_mismatch", tensor.spec.name, expected=f"{list(expected)} as in the base",
                    found=found or f"{list(tensor.spec.shape)}", advice=OTHER_BASE)  # fmt: skip

    def _no_base_tensor(self, tensor: StoredTensor, name: str) -> None:
        if self._neighbours is None:
            self._neighbours = Neighbours(self.base)
        near = self._neighbours.nearest(name)
        found = f"nearest is {near}" if near else "nothing near"
        self.refuse("no_base_tensor", tensor.spec.name, expected=name, found=found, advice=OTHER_BASE)


def _grows(base: Sequence[int], saved: Sequence[int]) -> bool:
    return len(base) == 2 == len(saved) and saved[1] == base[1] and saved[0] > base[0]
