"""Make a LoRA of what fine-tuning a whole model changed: the nearest one of a rank, tensor by tensor, with what it leaves out measured.

Linear layers get factors. Norms, and biases of linear layers, are vectors that no factors can hold: they are kept whole. Embeddings and output
heads are covered when they are asked for. What is not covered is named in the result and recorded with it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from registry.base_models import current_base, open_base
from registry.disk import appearing, passing
from registry.errors import BaseChanged, InvalidInput, NotConvertible, Refused
from registry.formats import read_adapter, resolve
from registry.formats.adapter import TOKENIZER_FILES, spec_like
from registry.formats.base_model import find_embeddings
from registry.formats.peft import CONFIG_FILE, WEIGHTS_FILES
from registry.formats.peft_matching import is_conv1d
from registry.locations import Location, open_location
from registry.lora_files import brief_names, peft_config, write_json
from registry.manifest import BaseFormat, BaseModel, Level, Metric, Origin, Report
from registry.merge.extract import at_once, difference, distance, fit, peak_bytes
from registry.merge.weight import one_thread
from registry.rearranging import Model, copy_files
from registry.registering import Registered, Registration, register
from registry.tensors import DType, StoredTensor, TensorSpec
from registry.weights_files import write_safetensors
from registry.workspace import Progress, Workspace, silent

RECORD_FILE = "extraction.json"
METRIC = "extraction_residual"
_WORDS = "a LoRA"
_PREFIX = "base_model.model."
_COPIED = (
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_LISTED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Extract:
    """What to make of the difference.

    `modules` that get factors, by the ends of their names; empty for every linear layer but the output head. `saved` are kept whole; None for
    norms and biases, empty for nothing. At least one of `out` (a new folder) and `name` (to register it under) is given.
    """

    rank: int
    modules: tuple[str, ...] = ()
    saved: tuple[str, ...] | None = None
    dtype: DType = DType.F32
    out: Path | None = None
    name: str = ""

    def check(self) -> None:
        """See that it makes sense.

        Raises:
            InvalidInput: it does not.
        """
        if self.rank < 1:
            raise InvalidInput("rank", self.rank, "a whole number of at least 1")
        if not self.dtype.is_mergeable:
            raise InvalidInput("dtype", self.dtype.long_name, "expected float32, bfloat16, float16 or float64")
        if self.out is None and not self.name:
            raise InvalidInput("--out", "", "say where to: --out DIR, or --as NAME, or both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """What became of a tensor that fine-tuning changed. `size` is `‖Δ‖`, `residual` `‖Δ - s B A‖ / ‖Δ‖` (0 where it is kept whole)."""

    name: str
    kind: Literal["factors", "whole", "not covered"]
    size: float
    residual: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """The adapter that was made. `residual` is that of all tensors together, whether covered or not; `factors` that of those with factors.

    `place` is the folder that was written, empty when there is none; `peak_bytes` about how much memory it took.
    """

    place: str
    rank: int
    tensors: tuple[Extracted, ...]
    residual: float
    factors: float
    peak_bytes: int
    registered: Registered | None = None

    @property
    def not_covered(self) -> tuple[Extracted, ...]:
        """What the adapter does not do, the largest change first."""
        left = [tensor for tensor in self.tensors if tensor.kind == "not covered"]
        return tuple(sorted(left, key=lambda tensor: -tensor.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sorted:
    """The tensors that changed, by what becomes of them.

    `whole` has every tensor of the saved modules. `biases` are those kept by PEFT's option for them, `bias` what it is set to.
    """

    factors: tuple[StoredTensor, ...]
    whole: tuple[StoredTensor, ...]
    biases: tuple[StoredTensor, ...]
    bias: Literal["none", "lora_only", "all"]
    not_covered: Mapping[str, str]


def extract(
    workspace: Workspace, base: BaseModel, tuned: Model, wanted: Extract, progress: Progress = silent
) -> Extraction:
    """Make a LoRA of the difference between a base model and its fine-tuned self.

    Args:
        workspace: where both are found.
        base: the model that was fine-tuned; in transformers' layout.
        tuned: what became of it; it is closed.
        wanted: what to make.
        progress: told of the bytes of the weights that are done.

    Raises:
        InvalidInput: a module that is named is not there.
        NotConvertible: the two do not have the same tensors, or nothing changed that could be covered.
        BaseChanged: the base is not what was recorded.
        Conflict: something is there already.
    """
    wanted.check()
    current, changed_files = current_base(workspace, base)
    if changed_files:
        raise BaseChanged(changed_files[0], "the file that was recorded", "another one")
    with closing(open_base(workspace, current)) as location, closing(tuned.location):
        making = _Making(current, location, tuned, wanted, progress)
        with appearing(wanted.out) if wanted.out else passing(workspace.settings.home / "making") as folder:
            result = making.run(folder)
            if wanted.name:
                result = replace(result, registered=_register(workspace, current, tuned, folder, wanted, result))
    return result


@dataclass(slots=True)
class _Making:
    """One extraction."""

    base: BaseModel
    location: Location
    tuned: Model
    wanted: Extract
    progress: Progress
    before: dict[str, StoredTensor] = field(init=False)
    after: dict[str, StoredTensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = {tensor.spec.name: tensor for tensor in self.base.tensors}
        self.after = {tensor.spec.name: tensor for tensor in self.tuned.tensors}

    def run(self, folder: Path) -> Extraction:
        self._check_same()
        sorted_ = _sort(self.base, self._changed(), self.wanted)
        if not (sorted_.factors or sorted_.whole or sorted_.biases):
            reasons = [f"{name}: {reason}" for name, reason in sorted_.not_covered.items()]
            raise NotConvertible(
                self.tuned.label, f"{_WORDS} on {self.base.name}", reasons or ["not one value differs"]
            )
        done = [*self._write(folder, sorted_), *self._left_out(sorted_)]
        squares = [(each.size * each.residual) ** 2 for each in done]
        with_factors = [number for each, number in zip(done, squares, strict=True) if each.kind == "factors"]
        total = sum(each.size**2 for each in done)
        shapes = [_matrix_shape(tensor.spec) for tensor in sorted_.factors]
        result = Extraction(
            place=str(self.wanted.out or ""),
            rank=self.wanted.rank,
            tensors=tuple(done),
            residual=math.sqrt(sum(squares) / total) if total else 0.0,
            factors=_share(sum(with_factors), sum(each.size**2 for each in done if each.kind == "factors")),
            peak_bytes=max((peak_bytes(shape, self.wanted.rank, at_once()) for shape in shapes), default=0),
        )
        write_json(folder / RECORD_FILE, extraction_json(result, self.tuned.origin))
        present = self.tuned.location.files()
        copy_files(self.tuned.location, [path for path in _COPIED if path in present], folder)
        self._check_fits(folder)
        return result

    # -- what changed

    def _check_same(self) -> None:
        formats = {self.base.format, self.tuned.head.format}
        if formats != {BaseFormat.SAFETENSORS}:
            raise NotConvertible(
                self.tuned.label,
                _WORDS,
                ["base and fine-tuned model must be in transformers' layout: `ckpt convert` makes it"],
            )
        same_head = self._tied_copy()
        reasons = [f"{name}: only in the base" for name in self.before.keys() - self.after.keys()]
        reasons += [
            f"{name}: only in the fine-tuned model" for name in self.after.keys() - self.before.keys() - same_head
        ]
        for name in self.before.keys() & self.after.keys():
            shapes = [list(tensors[name].spec.shape) for tensors in (self.before, self.after)]
            if shapes[0] != shapes[1]:
                reasons.append(
                    f"{name}: {shapes[1]} instead of {shapes[0]}; a resized vocabulary has no place in a LoRA"
                )
        if reasons:
            raise NotConvertible(self.tuned.label, f"{_WORDS} on {self.base.name}", sorted(reasons))

    def _tied_copy(self) -> set[str]:
        """An output head that a tied model was saved with, although it is the embedding."""
        found = find_embeddings(self.base)
        if found is None or not found.tied or found.head_name in self.before:
            return set()
        digests = self.tuned.digests
        return {found.head_name} if digests.get(found.head_name) == digests.get(found.input_name) else set()

    def _changed(self) -> list[str]:
        """Names of the tensors with other values, in the base's order."""
        known = self.base.fingerprint.tensors
        names = [name for name in self.before if known[name] != self.tuned.digests[name]]
        specs = [tensors[name].spec for name in names for tensors in (self.before, self.after)]
        if odd := [f"{spec.name}: {spec.dtype.long_name} in it" for spec in specs if not spec.dtype.is_mergeable]:
            raise NotConvertible(self.tuned.label, _WORDS, odd)
        return [name for name in names if self._is_same_dtype(name) or self._distance(name)]

    def _is_same_dtype(self, name: str) -> bool:
        return self.before[name].spec.dtype is self.after[name].spec.dtype

    def _distance(self, name: str) -> float:
        return distance((self.location, self.before[name]), (self.tuned.location, self.after[name]))

    # -- writing

    def _write(self, folder: Path, sorted_: _Sorted) -> list[Extracted]:
        wholes = [*sorted_.whole, *sorted_.biases]
        specs = [spec for tensor in sorted_.factors for spec in self._factor_specs(tensor)]
        targeted = {_module(tensor) for tensor in sorted_.factors}
        specs += [spec_like(self.after[t.spec.name].spec, name=_whole_key(t, targeted)) for t in wholes]
        done: list[Extracted] = []
        write_safetensors(folder / WEIGHTS_FILES[0], specs, self._data(sorted_.factors, wholes, done))
        write_json(folder / CONFIG_FILE, self._config(sorted_))
        return done

    def _data(
        self, factors: Sequence[StoredTensor], wholes: Sequence[StoredTensor], done: list[Extracted]
    ) -> Iterator[bytes]:
        """The bytes of all tensors in order; what became of each is added to `done` on the way."""
        total = sum(tensor.spec.size_bytes for tensor in factors)
        for tensor, (pair, record) in self._fits(factors):
            yield from pair
            self.progress("extracting", tensor.spec.size_bytes, total)
            done.append(record)
        for tensor in wholes:
            yield _read(self.tuned.location, self.after[tensor.spec.name])
            if size := self._distance(tensor.spec.name):
                done.append(Extracted(name=tensor.spec.name, kind="whole", size=size, residual=0.0))

    def _fits(
        self, tensors: Sequence[StoredTensor]
    ) -> Iterator[tuple[StoredTensor, tuple[tuple[bytes, bytes], Extracted]]]:
        """The factors of every tensor, in order; a few are worked on at once."""
        count = at_once()
        with one_thread(), ThreadPoolExecutor(count) as pool:
            waiting: deque[tuple[StoredTensor, Future[tuple[tuple[bytes, bytes], Extracted]]]] = deque()
            try:
                for tensor in tensors:
                    if len(waiting) == count:
                        done, future = waiting.popleft()
                        yield done, future.result()
                    waiting.append((tensor, pool.submit(self._fit, tensor)))
                while waiting:
                    done, future = waiting.popleft()
                    yield done, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _factor_specs(self, tensor: StoredTensor) -> tuple[TensorSpec, TensorSpec]:
        module, (d_out, d_in), dtype = _module(tensor), self._logical(tensor), self.wanted.dtype
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if self._is_embedding(tensor)
            else ("lora_A.weight", "lora_B.weight")
        )
        return (
            TensorSpec(f"{_PREFIX}{module}.{a}", dtype, (self.wanted.rank, d_in)),
            TensorSpec(f"{_PREFIX}{module}.{b}", dtype, (d_out, self.wanted.rank)),
        )

    def _fit(self, tensor: StoredTensor) -> tuple[tuple[bytes, bytes], Extracted]:
        name, shape = tensor.spec.name, _matrix_shape(tensor.spec)
        delta, size = difference((self.location, tensor), (self.tuned.location, self.after[name]), shape)
        if not math.isfinite(size):
            raise NotConvertible(self.tuned.label, _WORDS, [f"{name}: NaN or infinity in it"])
        found = fit(delta.T if self._is_transposed(tensor) else delta, size, self.wanted.rank, name, self.wanted.dtype)
        residual = found.residual / size if size else 0.0
        return (found.right, found.left), Extracted(name=name, kind="factors", size=size, residual=residual)

    def _is_embedding(self, tensor: StoredTensor) -> bool:
        found = find_embeddings(self.base)
        return found is not None and tensor.spec.name == found.input_name

    def _is_transposed(self, tensor: StoredTensor) -> bool:
        """Whether PEFT's factors are those of the stored weight's transpose."""
        return self._is_embedding(tensor) or is_conv1d(str(self.base.config.get("model_type")), _module(tensor))

    def _logical(self, tensor: StoredTensor) -> tuple[int, int]:
        rows, columns = _matrix_shape(tensor.spec)
        return (columns, rows) if self._is_transposed(tensor) else (rows, columns)

    def _config(self, sorted_: _Sorted) -> dict[str, Any]:
        ranks = {_module(tensor): self.wanted.rank for tensor in sorted_.factors}
        everywhere = list(dict.fromkeys(name.rpartition(".")[0] for name in self.before))
        config = peft_config(ranks, dict.fromkeys(ranks, 1.0), base_name=self.base.url, base_modules=everywhere)
        saved = list(dict.fromkeys(_module(tensor) for tensor in sorted_.whole))
        transposed = any(is_conv1d(str(self.base.config.get("model_type")), module) for module in ranks)
        return {
            **config,
            "bias": sorted_.bias,
            "fan_in_fan_out": transposed,
            "modules_to_save": _saved_names(saved, everywhere) or None,
        }

    def _left_out(self, sorted_: _Sorted) -> Iterator[Extracted]:
        for name, reason in sorted_.not_covered.items():
            yield Extracted(name=name, kind="not covered", size=self._distance(name), residual=1.0, reason=reason)

    def _check_fits(self, folder: Path) -> None:
        adapter = read_adapter(open_location(str(folder)))
        findings = resolve(adapter, self.base).findings
        if any(finding.level is Level.REFUSED for finding in findings):
            raise Refused(Report(checkpoint=f"{_WORDS} of {self.tuned.label}", base=self.base.name, findings=findings))


def _share(square: float, total: float) -> float:
    return math.sqrt(square / total) if total else 0.0


def _module(tensor: StoredTensor) -> str:
    return tensor.spec.name.rpartition(".")[0]


def _matrix_shape(spec: TensorSpec) -> tuple[int, int]:
    return spec.shape[0], spec.shape[1]


def _whole_key(tensor: StoredTensor, targeted: set[str]) -> str:
    """PEFT's key of a value that replaces the base's; the bias of a layer with factors lies one level deeper."""
    module, _, kind = tensor.spec.name.rpartition(".")
    return f"{_PREFIX}{module}.base_layer.{kind}" if module in targeted else f"{_PREFIX}{module}.{kind}"


def _read(location: Location, tensor: StoredTensor) -> bytes:
    data = bytearray(tensor.spec.size_bytes)
    location.read_into(tensor.file, tensor.offset_bytes, memoryview(data))
    return bytes(data)


# -- what becomes of each tensor


def _sort(base: BaseModel, changed: Sequence[str], wanted: Extract) -> _Sorted:
    """Say for every tensor that changed what becomes of it."""
    tensors = {tensor.spec.name: tensor for tensor in base.tensors}
    _check_names(tensors, wanted)
    embeddings = find_embeddings(base)
    special = {embeddings.input_name, embeddings.head_name} if embeddings else set()
    is_tied = embeddings is not None and embeddings.tied
    factors, saved, left = [], set[str](), dict[str, str]()
    biases: list[str] = []
    for name in changed:
        module, _, kind = name.rpartition(".")
        is_asked = _selected(module, wanted.modules)
        if name in special and is_tied:
            left[name] = "embedding and output head are one matrix, which an adapter would take apart"
        elif _selected(module, wanted.saved or ()):
            saved.add(module)
        elif kind == "weight" and len(tensors[name].spec.shape) == 2:
            if is_asked or (not wanted.modules and name not in special):
                factors.append(tensors[name])
            else:
                left[name] = (
                    "an embedding or output head: name it in --modules or --save"
                    if name in special
                    else "not among --modules"
                )
        elif wanted.saved is not None or kind not in ("weight", "bias") or len(tensors[name].spec.shape) != 1:
            left[name] = "no matrix, so that low-rank factors cannot hold it"
        elif _is_linear(module, tensors):
            biases.append(name)
        else:
            saved.add(module)
    return _Sorted(
        factors=tuple(factors),
        whole=tuple(tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in saved),
        not_covered=left,
        **_biases(tensors, biases, {_module(tensor) for tensor in factors}, saved),
    )


def _check_names(tensors: Mapping[str, StoredTensor], wanted: Extract) -> None:
    modules = {name.rpartition(".")[0] for name in tensors}
    for option, names in (("--modules", wanted.modules), ("--save", wanted.saved or ())):
        for name in names:
            if not any(_selected(module, (name,)) for module in modules):
                raise InvalidInput(option, name, "the base model has no such module")


def _selected(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_linear(module: str, tensors: Mapping[str, StoredTensor]) -> bool:
    weight = tensors.get(f"{module}.weight")
    return weight is not None and len(weight.spec.shape) > 1


def _biases(
    tensors: Mapping[str, StoredTensor], changed: Sequence[str], targeted: set[str], saved: set[str]
) -> dict[str, Any]:
    """PEFT keeps the biases of all layers with factors, or all there are: the smaller set that has every one that changed."""
    if not changed:
        return {"biases": (), "bias": "none"}
    only = {name.rpartition(".")[0] for name in changed} <= targeted
    kept = [
        tensor
        for name, tensor in tensors.items()
        if name.endswith(".bias") and _module(tensor) not in saved and (not only or _module(tensor) in targeted)
    ]
    return {"biases": tuple(kept), "bias": "lora_only" if only else "all"}


def _saved_names(saved: Sequence[str], everywhere: Sequence[str]) -> list[str]:
    """As `brief_names`, but PEFT compares saved modules without a dot in front: `norm` would be `layernorm` as well."""
    brief = brief_names(saved, everywhere)
    chosen = set(saved)
    is_clear = {name: all(other in chosen for other in everywhere if other.endswith(name)) for name in brief}
    whole = [name for name in saved if not is_clear.get(name.rpartition(".")[2], False)]
    return [*(name for name in brief if is_clear[name] and name not in whole), *whole]


# -- recording


def extraction_json(result: Extraction, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """What `extraction.json` says: what the adapter was made of, and what became of every tensor that changed."""
    return {
        "from": dict(tuned),
        "rank": result.rank,
        "residual": result.residual,
        "residual_of_factors": result.factors,
        "tensors": {
            each.name: {"kind": each.kind, "norm": each.size, "residual": each.residual, **({"reason": each.reason} if each.reason else {})}
            for each in result.tensors
        },
    }  # fmt: skip


def _register(
    workspace: Workspace, base: BaseModel, tuned: Model, folder: Path, wanted: Extract, result: Extraction
) -> Registered:
    left = [each.name for each in result.not_covered]
    detail: dict[str, Any] = {"from": dict(tuned.origin), "rank": wanted.rank, "residual": result.residual}
    if left:
        detail["not_covered"] = left[:_LISTED] + ([f"and {len(left) - _LISTED} more"] if len(left) > _LISTED else [])
    said = Registration(
        adapter=wanted.name, base=base.digest.hex, run="extracted", source=f"extract of {tuned.label}",
        metrics=(Metric(name=METRIC, value=result.residual, direction="lower"),), origin=Origin(action="extract", detail=detail),
    )  # fmt: skip
    (registered,) = register(workspace, str(folder), said, progress=silent).registered
    return registered
