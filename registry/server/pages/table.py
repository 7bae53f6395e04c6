"""The list of checkpoints as a page: filtered, sorted, in parts, with metrics as columns; and tags for several at once.

Everything that the list shows follows from its address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final
from urllib.parse import urlencode, urlsplit

from registry.db.listing import Scope as Listed
from registry.errors import InvalidFilter, InvalidInput, InvalidReference, UnknownAdapter
from registry.filters import Filter, parse_filter
from registry.manifest import Checkpoint
from registry.refs import AdapterName, check_name
from registry.selection import most_telling
from registry.server.pages.signing_in import own_url
from registry.server.pages.visits import Moved, Pages, Shown, Values, Visit
from registry.server.scope import Scope
from registry.teamwork import Role
from registry.wording import Words, explain

pages = Pages("checkpoints")

SIZES = (50, 100, 200)
_EASILY_SORTED = 200_000  # by what has no index
_COLUMNS = 3  # where nobody has chosen
_MOST_COLUMNS = 12
_COMMON = 12
_LISTED_METRICS = 200
_LISTED_ADAPTERS = 200
_TRAIL = 12
_MOST_TAGGED = 500


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Which part of which list. `metrics` are its columns, None where nobody has chosen. `trail` are the cursors of the pages on the way,
    the last one that of this page.
    """

    adapter: str = ""
    where: str = ""
    sort: str = ""
    metrics: tuple[str, ...] | None = None
    limit: int = SIZES[0]
    trail: tuple[str, ...] = ()

    @classmethod
    def of(cls, query: Values) -> Asked:
        """What a query asks for.

        Raises:
            InvalidInput: the size of the pages is not acceptable.
        """
        return cls(
            adapter=query.one("adapter"),
            where=query.one("where"),
            sort=query.one("sort"),
            metrics=tuple(query.all("metric")[:_MOST_COLUMNS]) if query.has("metric") else None,
            limit=query.number("limit", SIZES[0], range(1, SIZES[-1] + 1)),
            trail=tuple(query.all("cursor")),
        )

    @property
    def url(self) -> str:
        """Its address."""
        said = [("adapter", self.adapter), ("where", self.where), ("sort", self.sort)]
        pairs = [pair for pair in said if pair[1]]
        if self.metrics is not None:
            pairs += [("metric", name) for name in self.metrics or ("",)]
        if self.limit != SIZES[0]:
            pairs.append(("limit", str(self.limit)))
        pairs += [("cursor", each) for each in self.trail]
        return f"/checkpoints?{urlencode(pairs)}" if pairs else "/checkpoints"

    def filtered(self, where: str) -> str:
        """The address of the list with another filter."""
        return replace(self, where=where, trail=()).url

    def by(self, key: str) -> str:
        """The address of the list sorted by a key; by the reverse, if it is already."""
        return replace(self, sort=f"-{key}" if self.sort == key else key, trail=()).url

    def order(self, key: str) -> Literal["ascending", "descending", "none"]:
        """How the list is sorted by a key."""
        return {key: "ascending", f"-{key}": "descending"}.get(self.sort, "none")  # type: ignore[return-value]

    def with_tag(self, key: str, value: str) -> str:
        """The address of the list of those that also have a tag."""
        quoted = value.replace("'", "''")
        condition = f"tag.{key if key.isidentifier() else _in_quotes(key)} = '{quoted}'"
        return self.filtered(f"({self.where}) and {condition}" if self.where else condition)

    def after(self, cursor: str) -> str:
        """The address of the page that a cursor goes on with; empty where there is none."""
        return replace(self, trail=(*self.trail, cursor)[-_TRAIL:]).url if cursor else ""

    @property
    def before(self) -> str:
        """The address of the page that this one followed; empty for the first."""
        return replace(self, trail=self.trail[:-1]).url if self.trail else ""

    @property
    def first(self) -> str:
        """The address of the first page."""
        return replace(self, trail=()).url


def _in_quotes(key: str) -> str:
    return f'"{key}"'


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A page of the list. `best` is the best of all that pass the filter by the metric `ranked`; None where that cannot be told.

    `total` counts them all, None where that would take long; `is_long`: too many to be sorted by just anything. `problems` are what is wrong
    with the fields `adapter` and `where`, the filter from its character `wrong_from` on.
    """

    checkpoints: tuple[Checkpoint, ...] = ()
    columns: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    cursor: str = ""
    ranked: str = ""
    best: Checkpoint | None = None
    total: int | None = None
    is_long: bool = False
    problems: dict[str, Words] | None = None
    wrong_from: int = 0

    @property
    def sum_up(self) -> str:
        """How many are shown, in words."""
        shown = len(self.checkpoints)
        if self.total is not None and self.total != shown:
            return f"{shown:,} of {self.total:,} checkpoints"
        more = ", and more follow" if self.cursor and self.total is None else ""
        return f"{shown:,} checkpoint{'' if shown == 1 else 's'}{more}"


@pages.page("GET", "/checkpoints", Role.READER)
def list_checkpoints(visit: Visit) -> Shown:
    """Checkpoints in a table."""
    asked = Asked.of(visit.query)
    found = _found(visit.scope, asked)
    # when somebody goes back, the script asks for the page as a whole
    is_part = visit.is_partial
    status = 400 if found.problems and not is_part else 200
    with visit.scope.registry.workspace.reading() as catalog:
        adapters = catalog.overview.names(_LISTED_ADAPTERS, visit.scope.namespaces)
    return Shown(
        "_checkpoints.html" if is_part else "checkpoints.html",
        status=status,
        asked=asked,
        found=found,
        adapters=adapters,
        sizes=sorted({*SIZES, asked.limit}),
        tagged=visit.query.number("tagged", 0, range(_MOST_TAGGED + 1)),
        is_part=is_part,
    )


def _found(scope: Scope, asked: Asked) -> Listing:
    """The part of the list that is asked for, or what is wrong with the question.

    Raises:
        InvalidInput: the order or the place in the list is not acceptable.
    """
    problems: dict[str, Words] = {}
    where, metrics, wrong_from = None, [], 0
    try:
        where = parse_filter(asked.where) if asked.where else None
    except InvalidFilter as error:
        problems["where"], wrong_from = explain(error), error.position
    try:
        if asked.adapter:
            scope.adapter(asked.adapter)
        metrics = scope.discreetly(lambda: scope.registry.metric_names(asked.adapter, scope.namespaces))
    except (UnknownAdapter, InvalidReference) as error:
        problems["adapter"] = explain(error)
    columns = tuple(most_telling(metrics[:_COMMON])[:_COLUMNS]) if asked.metrics is None else asked.metrics
    if problems:
        return Listing(columns=columns, metrics=_choice(metrics, columns), problems=problems, wrong_from=wrong_from)
    return _listed(scope, asked, where, metrics, columns)


def _listed(
    scope: Scope, asked: Asked, where: Filter | None, metrics: Sequence[str], columns: tuple[str, ...]
) -> Listing:
    page = scope.registry.page(
        asked.adapter,
        where,
        sort=asked.sort,
        cursor=asked.trail[-1] if asked.trail else "",
        limit=asked.limit,
        namespaces=scope.namespaces,
    )
    name = AdapterName.parse(asked.adapter) if asked.adapter else None
    ranked = asked.sort.removeprefix("-").removeprefix("metric.") if "metric." in asked.sort else ""
    ranked = ranked or (columns[0] if columns else "")
    with scope.registry.workspace.reading() as catalog:
        listed = Listed(name, where, scope.namespaces)
        best = catalog.overview.foremost(listed, ranked) if ranked and page.items else None
        count = catalog.overview.count(name, scope.namespaces)
    return Listing(
        checkpoints=page.items,
        columns=columns,
        metrics=_choice(metrics, columns),
        cursor=page.cursor,
        ranked=ranked,
        best=best,
        total=count if where is None else None,
        is_long=count > _EASILY_SORTED,
    )


def _choice(metrics: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The metrics to choose columns from: the chosen ones first."""
    return tuple(dict.fromkeys([*columns, *sorted(metrics[:_LISTED_METRICS])]))


# -- tags


@pages.page("GET", "/tag", Role.WRITER)
def choose_tags(visit: Visit) -> Shown:
    """Tags to set on the chosen checkpoints, or to take away."""
    came_from = visit.headers.get("hx-current-url") or visit.headers.get("referer") or ""
    return _tagging(visit, _chosen(visit.scope, visit.query), back=_list_url(came_from))


@pages.page("POST", "/tag", Role.WRITER)
def tag_checkpoints(visit: Visit) -> Shown | Moved:
    """Set tags on all of the chosen checkpoints and take others away, or change nothing."""
    chosen, back = _chosen(visit.scope, visit.form), _list_url(visit.form.one("back"))
    text, removed = visit.form.one("set"), visit.form.all("remove")
    try:
        tags = parse_tags(text)
        if not tags and not removed:
            raise InvalidInput("set", "", "say which tags to set, or to take away")
    except InvalidInput as error:
        return _tagging(visit, chosen, back=back, text=text, removed=removed, words=explain(error))
    _tag(visit.scope, chosen, tags, removed)
    query = urlsplit(back).query
    return Moved(f"/checkpoints?{query}{'&' if query else ''}tagged={len(chosen)}")


def _tag(scope: Scope, chosen: Sequence[Checkpoint], tags: dict[str, str], removed: Sequence[str]) -> None:
    with scope.registry.workspace.writing():
        for checkpoint in chosen:
            there = [key for key in removed if key in checkpoint.tags and key not in tags]
            if tags or there:
                scope.registry.tag(checkpoint, tags, there)


def _chosen(scope: Scope, said: Values) -> list[Checkpoint]:
    refs = said.all("ref")
    if not 1 <= len(refs) <= _MOST_TAGGED:
        raise InvalidInput("ref", f"{len(refs)} checkpoints", f"choose 1 to {_MOST_TAGGED}")
    return [scope.checkpoint(ref) for ref in refs]


def _list_url(text: str) -> str:
    """The address of a list of ours that a text holds, without what was said there; else that of the whole list."""
    parts = urlsplit(own_url(text if text.startswith("/") else urlsplit(text)._replace(scheme="", netloc="").geturl()))
    kept = "&".join(each for each in parts.query.split("&") if each and not each.startswith("tagged="))
    return f"/checkpoints?{kept}" if parts.path == "/checkpoints" and kept else "/checkpoints"


def _tagging(
    visit: Visit,
    chosen: Sequence[Checkpoint],
    *,
    back: str,
    text: str = "",
    removed: Sequence[str] = (),
    words: Words | None = None,
) -> Shown:
    present = sorted({key for checkpoint in chosen for key in checkpoint.tags})
    counts = {key: sum(key in checkpoint.tags for checkpoint in chosen) for key in present}
    values: dict[str, Any] = {"chosen": chosen, "counts": counts, "back": back, "text": text, "removed": removed}
    if visit.is_partial:
        return Shown("_tagging.html", words=words, **values)
    return Shown("tagging.html", status=400 if words else 200, words=words, **values)


def parse_tags(text: str) -> dict[str, str]:
    """Tags from lines `key=value`.

    Raises:
        InvalidInput: a line is none, or says a key again.
        InvalidReference: a key has characters that it cannot have.
    """
    tags: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, sign, value = (part.strip() for part in line.partition("="))
        if not sign or not key:
            raise InvalidInput("set", line[:80], "expected key=value on each line")
        if check_name(key) in tags:
            raise InvalidInput("set", line[:80], f"{key} is said twice")
        tags[key] = value
    return tags
