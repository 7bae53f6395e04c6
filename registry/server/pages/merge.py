"""Pages of merging: choose what and how, look at the report and the plan, then have it done, saved as a recipe, or made an adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, final

from registry.codec import plain
from registry.combining import Making
from registry.errors import Ambiguous, InvalidInput, InvalidRecipe, NotFound, Refused, RegistryError
from registry.manifest import Checkpoint, Report
from registry.merge.methods import METHODS
from registry.merging import Planned
from registry.ordering import CombineOrder
from registry.results import KeptRecipe, Outline
from registry.server.pages.mixing_form import DTYPES, METHOD_WORDS, OPTION_WORDS, Wanted, number
from registry.server.pages.moments import span
from registry.server.pages.visits import Moved, Pages, Shown, Visit
from registry.server.scope import Scope
from registry.teamwork import Job, Role
from registry.wording import Words, explain

pages = Pages("merge")

USUAL_RATE = 200_000_000  # bytes a second: less than any machine that was measured
_MOST_FOUND, _MOST_ADAPTERS, _LOOKED_AT, _MERGES_LOOKED_AT = 12, 6, 200, 20
_LONGEST_SEARCH = 200


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """An input: what was typed, what it means, or why it means nothing."""

    text: str
    checkpoint: Checkpoint | None = None
    problem: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long a merge is likely to take, and the rate in bytes a second that says so: that of so many `merges` here, or the usual one."""

    seconds: float
    rate: float
    merges: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What looking at a plan gave: an outline and an estimate, or what is in the way. `field` is where in the form that is."""

    outline: Outline | None = None
    estimate: Estimate | None = None
    report: Report | None = None
    words: Words | None = None
    field: str = ""


# -- choose


@pages.page("GET", "/merge", Role.WRITER, is_slow=True)
def show_merge(visit: Visit) -> Shown | Moved:
    """Choose what to merge and how. The address says all of it; adding and dropping an input lead to another address."""
    wanted, typed, is_looked = Wanted.of(visit.query), visit.query.one("find"), visit.query.has("look")
    added, dropped = visit.query.all("add"), visit.query.all("drop")
    if typed and not added and _means_one(visit.scope, typed):
        added = [typed]
    if added or dropped:
        return Moved(wanted.with_refs(ref for ref in (*wanted.refs, *added) if ref not in dropped).url())
    looked = _look(visit.scope, wanted) if is_looked and wanted.refs else None
    return Shown("merge.html", **_form(visit, wanted, looked), **_search(visit, wanted, typed))


@pages.page("GET", "/merge/setup", Role.WRITER)
def show_setup(visit: Visit) -> Shown:
    """The inputs and the method's own fields, after one was changed. What was planned before is of something else."""
    wanted = Wanted.of(visit.query)
    return Shown("_merge_changed.html", replace_url=wanted.url(), **_form(visit, wanted, None))


@pages.page("GET", "/merge/plan", Role.WRITER, is_slow=True)
def show_plan(visit: Visit) -> Shown:
    """The report and the plan."""
    wanted = Wanted.of(visit.query)
    looked = _look(visit.scope, wanted)
    return Shown("_merge_looked.html", replace_url=wanted.url(is_looked=True), **_form(visit, wanted, looked))


@pages.page("GET", "/merge/found", Role.WRITER)
def show_found(visit: Visit) -> Shown:
    """Checkpoints that a few letters may mean."""
    wanted = Wanted.of(visit.query)
    return Shown("_merge_found.html", wanted=wanted, **_search(visit, wanted, visit.query.one("find")))


def _form(visit: Visit, wanted: Wanted, looked: Looked | None) -> dict[str, Any]:
    return {
        "wanted": wanted,
        "chosen": [_chosen(visit.scope, ref) for ref in wanted.refs],
        "looked": looked,
        "method": METHODS.get(wanted.method, METHODS["linear"]),
        "methods": METHODS,
        "method_words": METHOD_WORDS,
        "option_words": OPTION_WORDS,
        "dtypes": DTYPES,
        "threads": os.cpu_count() or 1,
        "span": span,
        "wrong": {looked.field: looked.words.message} if looked and looked.field and looked.words else {},
    }


def _chosen(scope: Scope, text: str) -> Chosen:
    try:
        return Chosen(text=text, checkpoint=scope.checkpoint(text))
    except (NotFound, Ambiguous, InvalidInput) as error:
        return Chosen(text=text, problem=explain(error).message)


# -- search


def _search(visit: Visit, wanted: Wanted, typed: str) -> dict[str, Any]:
    is_asked = typed or not wanted.refs
    return {"typed": typed, "found": _suggestions(visit.scope, wanted, typed[:_LONGEST_SEARCH]) if is_asked else []}


def _means_one(scope: Scope, text: str) -> bool:
    """Whether a text is a whole reference, rather than a few letters of one."""
    return not _chosen(scope, text).problem


def _suggestions(scope: Scope, wanted: Wanted, typed: str) -> list[tuple[str, Checkpoint]]:
    """References that a few letters may mean, with their checkpoints: of the base model of what is chosen, and not chosen yet."""
    chosen = [each.checkpoint for each in (_chosen(scope, ref) for ref in wanted.refs) if each.checkpoint]
    found = [(typed, each) for each in [_chosen(scope, typed).checkpoint] if each] if typed else []
    found += [(each.ref, each) for each in _alike(scope, typed)]
    taken = {each.digest for each in chosen}
    unique: dict[str, tuple[str, Checkpoint]] = {}
    for text, each in found:
        if each.digest not in taken and (not chosen or each.base == chosen[0].base):
            unique.setdefault(each.digest.hex, (text, each))
    return list(unique.values())[:_MOST_FOUND]


def _alike(scope: Scope, typed: str) -> list[Checkpoint]:
    """The newest checkpoints of adapters with the letters before the `@` in their names, of whose own names one begins with those after."""
    name, _, rest = typed.partition("@")
    registry, limit = scope.registry, _LOOKED_AT if rest else 2 * _MOST_FOUND
    if not name:
        return list(registry.page(limit=limit, namespaces=scope.namespaces).items)
    lines = registry.adapters(name, _MOST_ADAPTERS, scope.namespaces)
    found = [each for line in lines for each in registry.page(str(line.name), limit=limit).items]
    return [each for each in found if not rest or any(label.startswith(rest) for label in _labels(each))]


def _labels(checkpoint: Checkpoint) -> list[str]:
    """What may follow the `@`."""
    step = [f"step:{checkpoint.step}"] if checkpoint.step is not None else []
    run = [f"run:{checkpoint.run}"] if checkpoint.run else []
    return [f"v{checkpoint.version}", *checkpoint.aliases, *checkpoint.environments, *step, *run]


# -- look


def _look(scope: Scope, wanted: Wanted) -> Looked:
    try:
        planned = _planned(scope, wanted)
    except Refused as error:
        return Looked(report=error.report, words=explain(error))
    except InvalidRecipe as error:
        return Looked(words=explain(error), field=error.field)
    except RegistryError as error:
        return Looked(words=explain(error))
    outline = planned.outline
    return Looked(outline=outline, report=outline.report, estimate=estimate(scope, outline))


def _planned(scope: Scope, wanted: Wanted) -> Planned:
    """What merging would do.

    Raises:
        Refused, InvalidRecipe, NotFound: as `Registry.plan`.
    """
    mixture, dtype = wanted.mixture(), wanted.wanted_dtype()
    inputs = [scope.checkpoint(ref) for ref in wanted.refs]
    return scope.registry.plan(*inputs, mixture=mixture, dtype=dtype, allow_lossy=wanted.allow_lossy)


def estimate(scope: Scope, outline: Outline) -> Estimate:
    """How long a merge is likely to take, by the merges of a like size that were done here: those of much less tell how long starting takes."""
    done = [each for each in scope.registry.jobs("succeeded", _MERGES_LOOKED_AT) if each.kind == "merge"]
    took = [each for each in map(_bytes_and_seconds, done) if each[0] * 10 >= outline.size_bytes and each[1] > 0]
    rate = sum(size for size, _ in took) / sum(seconds for _, seconds in took) if took else float(USUAL_RATE)
    return Estimate(seconds=outline.size_bytes / rate, rate=rate, merges=len(took))


def _bytes_and_seconds(job: Job) -> tuple[int, float]:
    """What a job wrote and how long that took; no time where its result was there already."""
    if job.started_at is None or job.finished_at is None:
        return job.total_bytes, 0.0
    return job.total_bytes, (job.finished_at - job.started_at).total_seconds()


# -- do


@pages.page("POST", "/merge", Role.WRITER, is_slow=True)
def start_merge(visit: Visit) -> Moved | Shown:
    """Have it done."""
    wanted = Wanted.of(visit.form)
    try:
        return Moved(f"/jobs/{visit.scope.registry.start_merge(_planned(visit.scope, wanted), wanted.note).id}")
    except (Refused, InvalidRecipe) as error:
        return _refused(visit, wanted, error)


@pages.page("POST", "/merge/save", Role.WRITER, is_slow=True)
def save_recipe(visit: Visit) -> Moved | Shown:
    """Keep the recipe: its model can be downloaded, and is computed while it is sent."""
    wanted = Wanted.of(visit.form)
    try:
        planned = _planned(visit.scope, wanted)
        visit.scope.registry.save_recipe(planned, wanted.note)
    except (Refused, InvalidRecipe) as error:
        return _refused(visit, wanted, error)
    return Moved(f"/merge/saved/{planned.plan.recipe.digest.hex}")


@pages.page("GET", "/merge/saved", Role.READER)
def list_saved(visit: Visit) -> Shown:
    """The recipes that were saved, the newest first."""
    return Shown("merge_recipes.html", recipes=visit.scope.recipes()[::-1])


@pages.page("GET", "/merge/saved/{digest}", Role.READER)
def show_saved(visit: Visit) -> Shown:
    """A saved recipe: what it is made of, and how its model is loaded."""
    found = visit.scope.recipe(visit.path["digest"])
    inputs = list(zip(found.checkpoints, found.recipe.inputs, strict=True))
    return Shown("merge_recipe.html", saved=found, inputs=inputs, again=wanted_again(found).url(is_looked=True))


@pages.page("GET", "/merge/saved/{digest}/remove", Role.WRITER)
def ask_to_remove(visit: Visit) -> Shown:
    """What would be forgotten, to be confirmed."""
    found = visit.scope.recipe(visit.path["digest"])
    return Shown("_merge_remove.html" if visit.is_partial else "merge_remove.html", saved=found)


@pages.page("POST", "/merge/saved/{digest}/remove", Role.WRITER)
def remove_recipe(visit: Visit) -> Moved:
    """Keep it no longer."""
    visit.scope.registry.remove_recipe(visit.scope.recipe(visit.path["digest"]).recipe.digest.hex)
    return Moved("/merge/saved")


def wanted_again(saved: KeptRecipe) -> Wanted:
    """What has to be chosen for a recipe to come out."""
    recipe, method = saved.recipe, METHODS[saved.recipe.method]
    weights = {ref: f"{each.weight:.17g}" for ref, each in zip(saved.checkpoints, recipe.inputs, strict=True)}
    return Wanted(
        refs=saved.checkpoints,
        method=recipe.method,
        weights=weights if method.is_weighted else {},
        options={name: str(recipe.options[name]) for name in method.options},
        dtype=recipe.dtype.long_name if recipe.dtype else "",
        allow_lossy="allow_lossy" in recipe.options,
        note=saved.note,
    )


@pages.page("POST", "/merge/combine", Role.WRITER, is_slow=True)
def combine(visit: Visit) -> Moved | Shown:
    """Make a new adapter of the inputs."""
    wanted, name, rank = Wanted.of(visit.form), visit.form.one("adapter"), visit.form.one("rank")
    try:
        mixture = wanted.mixture()
        if not name:
            raise InvalidRecipe("adapter", "", "say what the new adapter is called")
        visit.scope.may_change(name)
        order = CombineOrder(
            checkpoints=tuple(visit.scope.checkpoint(ref).ref for ref in wanted.refs),
            mixture=mixture,
            rank=_rank(rank),
            making=Making(adapter=name, note=wanted.note),
        )
        return Moved(f"/jobs/{visit.scope.registry.start('combine', plain(order)).id}")
    except (Refused, InvalidRecipe) as error:
        return _refused(visit, wanted, error)


def _rank(text: str) -> int | None:
    found = number(text, "rank") if text else None
    if found is not None and (not isinstance(found, int) or found < 1):
        raise InvalidRecipe("rank", text[:80], "expected a whole number from 1")
    return found


def _refused(visit: Visit, wanted: Wanted, error: Refused | InvalidRecipe) -> Shown:
    report, at = (error.report, "") if isinstance(error, Refused) else (None, error.field)
    looked = Looked(report=report, words=explain(error), field=at)
    return Shown("merge.html", status=422, **_form(visit, wanted, looked), **_search(visit, wanted, ""))
