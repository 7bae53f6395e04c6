"""Make a new adapter of several: a plain LoRA of PEFT that does what a mixture of them does, registered with what it was made of.

The result is served like any other adapter. Where a method gives each input one share per tensor, it is exact at the inputs' summed rank (up
to the rounding of its factors to float32); at a chosen rank, and for methods that change single elements, it is the nearest there is, and what
is left out is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, final

from registry.base_models import open_base
from registry.errors import InvalidInput, InvalidRecipe, NothingMerged
from registry.examining import Examined
from registry.formats.adapter import TOKENIZER_FILES
from registry.formats.peft import CONFIG_FILE, WEIGHTS_FILES
from registry.formats.peft_combined import Layer, Layout, adapter_config, lay_out
from registry.lora_files import brief_names, write_json
from registry.manifest import Checkpoint, Origin, Recipe, Report, to_json
from registry.merge.methods import METHODS
from registry.mixing import Mixture, Together, together
from registry.refs import nearest_name
from registry.registering import Registration, register
from registry.tensors import DType, TensorSpec
from registry.weights_files import write_safetensors
from registry.workspace import Progress, Workspace, silent

if TYPE_CHECKING:
    from registry.merge.joining import Joined

_SIGNIFICANT_DIGITS = 6
_SMALL_FILES = (
    *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
# Other tools' names for the weighted sum: of the summed rank, and cut to one.
CAT, SVD = "cat", "svd"
_MAX_CANDIDATES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What the new adapter is called, and what is recorded with it. Empty `adapter`: a name made of the inputs' and the method."""

    adapter: str = ""
    run: str = "combined"
    note: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """A new adapter; `created` is False when its content was registered before.

    `rank` is that of its factors. `lost` is the norm of what is not in them over the norm of what was wanted, all tensors together, 0 where
    nothing was left out; `worst` the tensor that lost most, with its own share.
    """

    checkpoint: Checkpoint
    created: bool
    recipe: Recipe
    rank: int
    lost: float
    worst: tuple[str, float]
    report: Report


def combine(
    workspace: Workspace,
    examined: Sequence[Examined],
    mixture: Mixture,
    *,
    rank: int | None = None,
    making: Making | None = None,
    progress: Progress = silent,
) -> Combination:
    """Make and register one adapter.

    Args:
        workspace: where they are.
        examined: the checkpoints, compared with their one base.
        mixture: how they are weighed together; `cat` and `svd` are `linear` without and with a rank.
        rank: of the new adapter; None for the exact sum. `svd` takes the largest of its inputs where none is given.
        making: what it is called.
        progress: told how many bytes of the result are computed.

    Raises:
        Refused: an input does not fit, they do not go together, or what they do is no LoRA; carries every finding.
        InvalidRecipe: the mixture or the rank makes no sense.
        NothingMerged: nothing would be in it.
        NotFinite: a value would be too large for float32.
    """
    making = making or Making()
    if not making.adapter:
        making = replace(making, adapter=_name([each.checkpoint for each in examined], mixture.method))
    mixture, rank = _plain(mixture, rank, examined)
    joint = together(workspace, examined, mixture)
    layout = lay_out(joint.adapters, joint.resolution, {tensor.spec.name for tensor in joint.base.tensors})
    joint = joint.with_findings(layout.findings)
    made = _compute(workspace, joint, layout, rank, progress)
    with TemporaryDirectory(prefix="ckpt-") as folder:
        _write(workspace, made, Path(folder))
        return _register(workspace, made, Path(folder), making)


def _plain(mixture: Mixture, rank: int | None, examined: Sequence[Examined]) -> tuple[Mixture, int | None]:
    """The mixture under its own name, and the rank that it is cut to."""
    if rank is not None and rank < 1:
        raise InvalidRecipe("rank", rank, "expected at least 1")
    if mixture.method == CAT and rank is not None:
        raise InvalidRecipe("rank", rank, "cat keeps every rank; svd cuts to one")
    if mixture.method == SVD and rank is None:
        rank = max(each.checkpoint.manifest.rank or 1 for each in examined)
    if mixture.method in (CAT, SVD):
        mixture = replace(mixture, method="linear")
    if mixture.method in METHODS and not METHODS[mixture.method].is_exact and rank is None:
        raise InvalidRecipe(
            "rank", "", f"{mixture.method} changes single elements, which takes full rank: say to which rank to cut it"
        )
    return mixture, rank


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """The new adapter's values, by the name of the base tensor."""

    joint: Together
    layout: Layout
    factors: Mapping[str, Joined]
    whole: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """Of all factors: the largest that one has; others are filled up with zeros, so that no pattern of ranks is needed."""
        return max(each.rank for each in self.factors.values())

    @property
    def targets(self) -> list[str]:
        """The modules that have factors, by the last part of their path where that is exact."""
        paths = {name.removesuffix(".weight"): layer.module for name, layer in self.layout.layers.items()}
        modules = [tensor.spec.name.removesuffix(".weight") for tensor in self.joint.base.tensors]
        return sorted(paths.get(name, name) for name in brief_names(list(paths), modules))

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Names and float32 values of the file."""
        for name, layer in self.layout.layers.items():
            yield from zip(layer.names, _shaped(self.factors[name], layer, self.rank), strict=True)
        for name, key in self.layout.whole.items():
            yield key, self.whole[name]

    def losses(self) -> tuple[float, tuple[str, float]]:
        """The share that is not in the factors: of all tensors together, and of the one that lost most."""
        shares = {name: _share([each]) for name, each in self.factors.items()}
        worst = max(shares, key=lambda name: shares[name])
        return _share(self.factors.values()), (worst if shares[worst] else "", shares[worst])


def _share(found: Iterable[Joined]) -> float:
    cut = [(each.lost, each.energy) for each in found if each.lost is not None and each.energy is not None]
    lost, energy = sum(lost for lost, _ in cut), sum(energy for _, energy in cut)
    return float(f"{(lost / energy) ** 0.5:.{_SIGNIFICANT_DIGITS}g}") if energy else 0.0


def _compute(workspace: Workspace, joint: Together, layout: Layout, rank: int | None, progress: Progress) -> _Made:
    from registry.merge.joining import Joiner  # noqa: PLC0415 - torch takes a second to import

    changes = {change.target.name: change for change in joint.resolution.changes}
    total = sum(changes[name].target.size_bytes for name in (*layout.layers, *layout.whole))
    factors, whole = {}, {}
    with closing(open_base(workspace, joint.base)) as base, closing(joint.folder(workspace)) as folder:
        joiner = Joiner(base, folder)
        for name in layout.layers:
            factors[name] = joiner.factors(changes[name], rank)
            progress("combining", changes[name].target.size_bytes, total)
        for name in layout.whole:
            whole[name] = joiner.whole(changes[name])
            progress("combining", changes[name].target.size_bytes, total)
    if not any(each.left.any() and each.right.any() for each in factors.values()):
        raise NothingMerged(joint.base.name, 0.0)
    return _Made(joint=joint, layout=layout, factors=factors, whole=whole)


def _write(workspace: Workspace, made: _Made, folder: Path) -> None:
    """Write the adapter's folder."""
    write_json(folder / CONFIG_FILE, adapter_config(made.joint.adapters, made.rank, made.targets))
    with closing(made.joint.folder(workspace)) as inputs:
        for name in _SMALL_FILES:
            if name in inputs.files():
                with inputs.open(name) as stream:
                    (folder / name).write_bytes(stream.read())
    tensors = dict(made.tensors())
    specs = [TensorSpec(name, DType.F32, tuple(values.shape)) for name, values in tensors.items()]
    data = (values.astype("<f4", copy=False).tobytes() for values in tensors.values())
    write_safetensors(folder / WEIGHTS_FILES[0], specs, data)


def _shaped(found: Joined, layer: Layer, rank: int) -> tuple[Any, Any]:
    """A and B in the shapes that the layer has them in, with zeros up to the rank of all."""
    import numpy as np  # noqa: PLC0415 - listing need not wait for it

    missing = rank - found.rank
    left = np.pad(found.left, ((0, 0), (0, missing)))
    right = np.pad(found.right, ((0, missing), (0, 0)))
    a, b = (left.T, right.T) if layer.is_transposed else (right, left)
    return a.reshape(rank, *layer.a_inner), b.reshape(b.shape[0], rank, *layer.b_inner)


def _register(workspace: Workspace, made: _Made, folder: Path, making: Making) -> Combination:
    joint = made.joint
    recipe, inputs = joint.recipe, joint.checkpoints
    lost, worst = made.losses()
    shares = joint.shares or [item.weight for item in recipe.inputs]
    detail = {
        "method": recipe.method,
        "shares" if joint.shares else "weights": list(shares),
        "options": to_json(recipe.options),
        "rank": made.rank,
        "lost": lost,
        "inputs": [each.digest.hex for each in inputs],
    }
    said = Registration(
        adapter=making.adapter,
        base=joint.base.digest.hex,
        run=making.run,
        note=making.note,
        tags=making.tags,
        source=f"combine of {', '.join(each.ref for each in inputs)}",
        origin=Origin(action="combine", parents=tuple(each.ref for each in inputs), detail=detail),
    )
    (found,) = register(workspace, str(folder), said).registered
    return Combination(
        checkpoint=found.checkpoint,
        created=found.created,
        recipe=recipe,
        rank=made.rank,
        lost=lost,
        worst=worst,
        report=joint.report,
    )


def _name(inputs: Sequence[Checkpoint], label: str) -> str:
    names = dict.fromkeys(each.adapter.name for each in inputs)
    namespace = inputs[0].adapter.namespace
    joined_names = "-".join([*names, label])
    return str(nearest_name(f"{namespace}/{joined_names}" if namespace else joined_names, "adapter"))


def last_of(trail: Sequence[Checkpoint], count: int | None) -> list[Checkpoint]:
    """The last so many checkpoints of a run that have weights of their own; all of them for None.

    A run's final checkpoint often is its last step saved again: of those with the same weights, the first counts.

    Raises:
        InvalidRecipe: there are fewer.
    """
    distinct: dict[str, Checkpoint] = {}
    for each in trail:
        weights = next(file.digest.hex for file in each.manifest.files if file.path == each.manifest.weights_file)
        distinct.setdefault(weights, each)
    found = list(distinct.values())
    if count is not None and not 1 <= count <= len(found):
        raise InvalidRecipe(
            "average", f"last:{count}", f"the run has {len(found)} checkpoints with weights of their own up to this one"
        )
    return found if count is None else found[-count:]


def grid(text: str) -> tuple[Decimal, ...]:
    """The values of `first:last:step`, both ends included, or of a list `a,b,c`. In decimals, so that 0.1 stays what was typed.

    Raises:
        InvalidInput: neither, or more than a thousand values.
    """
    try:
        first, colon, rest = text.partition(":")
        if not colon:
            return tuple(dict.fromkeys(_decimal(part) for part in text.split(",")))
        last, step = (_decimal(part) for part in rest.split(":"))
        count = int((last - _decimal(first)) / step) + 1
        if not 1 <= count <= _MAX_CANDIDATES:
            raise InvalidInput("grid", text, f"makes {max(count, 0)} candidates; expected 1 to {_MAX_CANDIDATES}")
        return tuple(_decimal(first) + number * step for number in range(count))
    except (ValueError, ArithmeticError):
        raise InvalidInput(
            "grid", text, "expected first:last:step, such as 0:1:0.1, or values with commas between them"
        ) from None


def _decimal(text: str) -> Decimal:
    value = Decimal(text)
    if not value.is_finite():
        raise InvalidOperation
    return value


def candidates(
    workspace: Workspace,
    examined: Sequence[Examined],
    mixture: Mixture,
    option: str,
    values: Iterable[Decimal],
    *,
    rank: int | None = None,
    making: Making | None = None,
    progress: Progress = silent,
) -> list[Combination]:
    """One adapter for each value of an option of the method: versions of one name, tagged `option=value`, to be evaluated and ranked.

    Only their factors are stored, no merged weights: a candidate takes as much room as an adapter, and whatever runs adapters can evaluate it.

    Raises:
        Refused, InvalidRecipe, NothingMerged: as `combine`; what was made before stays.
    """
    making = making or Making()
    name = making.adapter or _name([each.checkpoint for each in examined], "sweep")
    made = []
    for value in values:
        number = int(value) if option == "seed" and value == int(value) else float(value)
        one = replace(mixture, options={**mixture.options, option: number})
        tags = {**making.tags, option: f"{value.normalize():f}"}
        called = replace(making, adapter=name, run="sweep", tags=tags)
        made.append(combine(workspace, examined, one, rank=rank, making=called, progress=progress))
    return made
