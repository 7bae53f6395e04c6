"""Weigh examined checkpoints together: the recipe, what they do to the base as one, and one report about all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from registry.changes import Resolution
from registry.errors import InvalidRecipe, Refused
from registry.examining import Examined
from registry.formats import Adapter, resolve
from registry.formats.adapter import TOKENIZER_FILES
from registry.formats.base_model import find_embeddings
from registry.formats.findings import accept_loss, misfit, warning
from registry.locations import Location
from registry.manifest import BaseFormat, BaseModel, Checkpoint, Finding, Level, Recipe, RecipeInput, Report
from registry.merge.methods import checked, fixed_coefficients
from registry.united import UnitedFolder, numbered, unite, without_copies
from registry.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How adapters are weighed together: what a recipe says besides their names.

    `weights` are one for each adapter; empty for the usual ones: equal shares of one for `linear`, else 1 for each. `options` are those
    of the method that are not to have their default.
    """

    method: str = "linear"
    weights: tuple[float, ...] = ()
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Examined checkpoints with the recipe that weighs them, what they do together, and the report that judges all of them.

    `adapters` are they as they lie in `folder`.
    """

    examined: tuple[Examined, ...]
    adapters: tuple[Adapter, ...]
    recipe: Recipe
    resolution: Resolution
    report: Report

    @property
    def base(self) -> BaseModel:
        """Their one base model."""
        return self.examined[0].base

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints in the recipe's order."""
        return tuple(each.checkpoint for each in self.examined)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """What each input is multiplied by, where that is one number for all tensors that needs no look at them."""
        return fixed_coefficients(self.recipe.method, [item.weight for item in self.recipe.inputs], self.recipe.options)

    @property
    def leading(self) -> int:
        """The number of the input whose tokenizer and templates the result gets: the first that has a tokenizer, else the first."""
        return next((number for number, each in enumerate(self.checkpoints) if each.manifest.tokenizer), 0)

    def folder(self, workspace: Workspace) -> Location:
        """The folder that their tensors lie in."""
        return UnitedFolder([workspace.folder_of(each) for each in self.checkpoints], self.leading)

    def with_findings(self, findings: Iterable[Finding]) -> Together:
        """The same with more findings.

        Raises:
            Refused: one of all its findings is a refusal; carries them all.
        """
        report = replace(self.report, findings=(*self.report.findings, *findings))
        if report.verdict is Level.REFUSED:
            raise Refused(report)
        return replace(self, report=report)


def together(
    workspace: Workspace, examined: Sequence[Examined], mixture: Mixture, *, allow_lossy: bool = False
) -> Together:
    """Weigh checkpoints together.

    Args:
        workspace: where they are.
        examined: the checkpoints, compared with their one base.
        mixture: how they are weighed.
        allow_lossy: accept what can only be merged in part; the report tells what is lost.

    Raises:
        Refused: a check found a reason not to, or the checkpoints do not go together; carries every finding.
        InvalidRecipe: method, weights or options make no sense.
    """
    base, report = examined[0].base, _joint_report(examined)
    recipe = make_recipe(base, [each.checkpoint for each in examined], mixture)
    accepted = accept_loss(report) if allow_lossy else report
    if accepted != report:
        recipe = replace(recipe, options={**recipe.options, "allow_lossy": True})
    first = examined[0]
    alone = Together(
        examined=tuple(examined), adapters=(first.adapter,), recipe=recipe, resolution=first.resolution, report=accepted
    ).with_findings(())
    if alone.shares == (1.0,):
        return alone
    adapters = tuple(numbered(each.adapter, number) for number, each in enumerate(examined))
    embeddings = find_embeddings(base) if base.format is BaseFormat.SAFETENSORS else None
    joint = replace(alone, adapters=adapters)
    with closing(joint.folder(workspace)) as folder:
        resolutions = [without_copies(resolve(adapter, base), folder, base) for adapter in adapters]
    united = unite(resolutions, recipe, embeddings)
    joint = replace(joint, resolution=united)
    return joint.with_findings((*united.findings, *_other_tokenizers(joint)))


def make_recipe(base: BaseModel, inputs: Sequence[Checkpoint], mixture: Mixture) -> Recipe:
    """The recipe of a mixture, with every option of its method said.

    Raises:
        InvalidRecipe: the method is unknown, or does not take so many inputs, these weights or these options.
    """
    count = len(inputs)
    if mixture.weights and len(mixture.weights) != count:
        raise InvalidRecipe(
            "weights", ",".join(f"{each:g}" for each in mixture.weights), f"expected one for each of {count} inputs"
        )
    weights = mixture.weights or (1 / count if mixture.method == "linear" else 1.0,) * count
    options = checked(mixture.method, weights, mixture.options)
    return Recipe(
        base=base.digest,
        inputs=tuple(
            RecipeInput(checkpoint=each.digest, weight=float(weight))
            for each, weight in zip(inputs, weights, strict=True)
        ),
        method=mixture.method,
        options=options,
    )


def check_bases(checkpoints: Sequence[Checkpoint]) -> None:
    """That all checkpoints were trained on the same base model, by its weights.

    Raises:
        InvalidRecipe: there are none.
        Refused: they were not; names every one that differs from the first.
    """
    if not checkpoints:
        raise InvalidRecipe("inputs", 0, "expected at least one")
    first = checkpoints[0]
    findings = tuple(
        misfit("base_weights", each.ref, expected=f"{first.base.short} ({first.base_name}), as {first.ref}",
               found=f"{each.base.short} ({each.base_name})", advice="only adapters of one base model can be put together")
        for each in checkpoints
        if each.base != first.base
    )  # fmt: skip
    if findings:
        raise Refused(Report(checkpoint=_names(checkpoints), base=first.base_name, findings=findings))


def _names(checkpoints: Sequence[Checkpoint]) -> str:
    return ", ".join(each.ref for each in checkpoints)


def _joint_report(examined: Sequence[Examined]) -> Report:
    """The reports of all inputs as one; where there are several, each finding says whose it is."""
    if len(examined) == 1:
        return examined[0].report
    findings = tuple(
        replace(finding, where=f"{each.checkpoint.ref}: {finding.where}")
        for each in examined
        for finding in each.report.findings
    )
    return Report(
        checkpoint=_names([each.checkpoint for each in examined]), base=examined[0].base.name, findings=findings
    )


def _other_tokenizers(joint: Together) -> Iterator[Finding]:
    leading = joint.checkpoints[joint.leading]
    kept = {entry.path: entry.digest for entry in leading.manifest.files if entry.path in TOKENIZER_FILES}
    for each in joint.checkpoints:
        files = {entry.path: entry.digest for entry in each.manifest.files}
        odd = [path for path, digest in kept.items() if files.get(path, digest) != digest]
        if odd:
            yield warning("tokenizers_differ", f"{each.ref}: {', '.join(odd)}", expected=f"the files of {leading.ref}",
                          found="others", advice=f"the result gets those of {leading.ref}")  # fmt: skip
