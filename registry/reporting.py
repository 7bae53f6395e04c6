"""A report on an adapter for a review: what is best and why, how it came to be, what speaks for it, and how it differs from what is live.

What is told is gathered here as a document of plain parts; `registry.report_forms` writes it as a page or as Markdown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal, final

from registry.comparing import Difference, MetricPair
from registry.curves import Chart, chart
from registry.errors import DirectionUnknown, MixedData, RegistryError, UnknownMetric, UnknownPolicy
from registry.manifest import Checkpoint, Level, Shipment, utc_now
from registry.policies import Advice, Failure, Judged, Policy, Selection, select
from registry.refs import AdapterName
from registry.results import Details
from registry.selection import best, most_telling
from registry.wording import explain

if TYPE_CHECKING:
    from registry.service import Registry

MOST_CANDIDATES = 20
MOST_CURVES = 4
_MOST_SHIPMENTS = 50
_MOST_WEIGHTS = 8
_MOST_STEPS_BACK = 12

Tone = Literal["plain", "good", "warning", "bad"]


@final
@dataclass(frozen=True, slots=True)
class Sentence:
    """A paragraph of text."""

    text: str
    tone: Tone = "plain"


@final
@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values."""

    pairs: tuple[tuple[str, str], ...]


@final
@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings; `numbers` are the headings of columns with numbers, `strong` the rows that stand out, from 0."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[str, ...] = ()
    strong: tuple[int, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Curves:
    """A metric over steps, a line for each run; `marked` are references with what they are, such as live in production."""

    chart: Chart
    marked: tuple[tuple[str, str], ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Quote:
    """Text as somebody wrote it, with who and when."""

    text: str
    by: str


Part = Sentence | Facts | Table | Curves | Quote


@final
@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what is under it."""

    title: str
    parts: tuple[Part, ...]


@final
@dataclass(frozen=True, slots=True)
class Document:
    """A report: what it is about, a line of when and of what, and its sections."""

    title: str
    about: str
    sections: tuple[Section, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Review:
    """What a report is made of. `selection` is None where nothing can be ranked; `because` says why. `subject` is what is recommended, or the
    best there is, or the newest.
    """

    adapter: str
    checkpoints: tuple[Checkpoint, ...]
    policy: str
    selection: Selection | None
    because: str
    subject: Checkpoint
    details: Details
    shipments: tuple[Shipment, ...]
    live: tuple[Shipment, ...]


def report(registry: Registry, adapter: str, policy: str = "", *, at: datetime | None = None) -> Document:
    """Gather a report on an adapter.

    Args:
        registry: where it is.
        adapter: which.
        policy: judge by this one instead of the adapter's own. Without any, the metric that all checkpoints share ranks them.
        at: when it is made, to be told in it; now when None.

    Raises:
        UnknownAdapter: it has no checkpoint.
        InvalidInput: the policy is none.
    """
    review = _gather(registry, adapter, policy)
    sections = [
        Section("Recommendation", tuple(_recommendation(review))),
        Section("Curves", tuple(_curves(review))),
        Section("Candidates", tuple(_candidates(review))),
        Section("Compared with what is live", tuple(_comparisons(registry, review))),
        Section("Evidence", tuple(_evidence(review))),
        Section("Lineage", tuple(_lineage(registry, review))),
        Section("Shipments", tuple(_shipments(review))),
        Section("Compatibility", tuple(_compatibility(review))),
    ]
    runs = len({each.run for each in review.checkpoints})
    about = (
        f"{_counted(len(review.checkpoints), 'checkpoint')} of {_counted(runs, 'run')}, made {_time(at or utc_now())}"
        f" by {registry.settings.author}"
    )
    return Document(f"Report on {adapter}", about, tuple(each for each in sections if each.parts))


def _gather(registry: Registry, adapter: str, policy: str) -> _Review:
    checkpoints = registry.checkpoints(str(AdapterName.parse(adapter)))
    text, because, selection = policy or _own_policy(registry, adapter), "", None
    try:
        selection = registry.select(adapter, policy) if text else _by_shared(checkpoints)
    except (UnknownMetric, DirectionUnknown, MixedData) as error:
        because = explain(error).message
    subject = checkpoints[-1]
    if selection is not None and selection.judged:
        subject = (selection.chosen or selection.judged[0]).checkpoint
    shipments = tuple(
        each for each in registry.shipments() if each.checkpoint.rpartition("@")[0] == str(subject.adapter)
    )
    return _Review(
        adapter=adapter,
        checkpoints=tuple(checkpoints),
        policy=text,
        selection=selection,
        because=because,
        subject=subject,
        details=registry.details(subject),
        shipments=shipments,
        live=tuple(each for each in shipments if each.until is None),
    )


def _own_policy(registry: Registry, adapter: str) -> str:
    try:
        return registry.policy(adapter).text
    except UnknownPolicy:
        return ""


def _by_shared(checkpoints: Sequence[Checkpoint]) -> Selection:
    """Without a policy: by the metric that all share."""
    ranking = best(checkpoints)
    return select(Policy(metric=ranking.metric, direction=ranking.direction), checkpoints)


# -- what is best


def _recommendation(review: _Review) -> Iterator[Part]:
    selection = review.selection
    if selection is None:
        yield Sentence(f"Nothing can be recommended: {review.because}.", "warning")
    elif selection.chosen is None:
        yield Sentence("No checkpoint meets every condition of the policy.", "bad")
    else:
        yield Sentence(_verdict(review, selection, selection.chosen), "good")
        over = selection.passed_over
        if over:
            yield Sentence(
                f"{_counted(len(over), 'checkpoint')} with a better value were passed over; see the candidates."
            )
    for advice in selection.advice if selection else ():
        yield Sentence(_advised(advice), "warning" if advice.may_stop else "plain")
    yield Facts(tuple((name, value) for name, value in _facts(review) if value))


def _verdict(review: _Review, selection: Selection, chosen: Judged) -> str:
    policy = selection.policy
    way = "lowest" if policy.direction == "lower" else "highest"
    conditions = " and ".join(map(str, policy.conditions))
    among = f" of those with {conditions}" if conditions else ""
    word = "policy" if review.policy else "metric that all share, as there is no policy"
    return f"{chosen.checkpoint.ref} has the {way} {policy.metric}{among}: {_number(chosen.value)}. By the {word}."


def _advised(advice: Advice) -> str:
    run = f"Run {advice.run}" if advice.run else "The run"
    if not advice.since:
        return f"{run}: the last checkpoint is the best one so far; going on may help."
    later = _counted(advice.since, "later checkpoint")
    return f"{run}: {later} no better than {advice.best}; {'it may stop' if advice.may_stop else 'going on may help'}."


def _facts(review: _Review) -> Iterator[tuple[str, str]]:
    subject = review.subject
    manifest = subject.manifest
    yield "checkpoint", subject.ref
    yield "digest", str(subject.digest)
    yield "run and step", f"{subject.run}, {'no step' if subject.step is None else f'step {subject.step}'}"
    rank = "" if manifest.rank is None else f", rank {manifest.rank}"
    yield "method", f"{manifest.method}{rank}, {manifest.parameters:,} parameters, {manifest.dtype}"
    yield "base model", f"{subject.base_name} ({subject.base.short})"
    yield "policy", review.policy
    yield "compatibility", "" if review.details.report is None else review.details.report.verdict.value
    yield "live in", ", ".join(sorted(subject.environments))
    yield "aliases", ", ".join(sorted(subject.aliases))
    yield "tags", ", ".join(f"{key}={value}" for key, value in sorted(subject.tags.items()))
    yield "registered", f"{_time(subject.created_at)} by {subject.author}"
    yield "from", subject.source


# -- how it came to be


def _curves(review: _Review) -> Iterator[Part]:
    for metric in _charted(review):
        try:
            yield Curves(chart(review.checkpoints, metric), tuple(_marks(review)))
        except UnknownMetric:
            continue  # nobody has a finite value of it
        except MixedData as error:
            yield Sentence(f"No curve: {explain(error).message}.", "warning")


def _charted(review: _Review) -> list[str]:
    """The policy's metrics first, then the most telling of the others; what was measured once tells no course."""
    policy = review.selection.policy if review.selection else None
    first = [policy.metric, *(each.metric for each in policy.conditions)] if policy else []
    measured = [name for each in review.checkpoints for name in {metric.name for metric in each.metrics}]
    others = [name for name in most_telling(dict.fromkeys(measured)) if not name.startswith("try/")]
    return [name for name in dict.fromkeys([*first, *others]) if measured.count(name) > 1][:MOST_CURVES]


def _marks(review: _Review) -> Iterator[tuple[str, str]]:
    if review.selection is not None and review.selection.chosen is not None:
        yield review.subject.ref, "recommended"
    for shipment in review.live:
        yield shipment.checkpoint, f"live in {shipment.environment}"


def _candidates(review: _Review) -> Iterator[Part]:
    selection = review.selection
    if selection is None:
        return
    metrics = list(dict.fromkeys([selection.policy.metric, *(each.metric for each in selection.policy.conditions)]))
    shown = list(selection.judged[:MOST_CANDIDATES])
    chosen = selection.chosen
    if chosen is not None and chosen not in shown:
        shown.append(chosen)
    yield Table(
        ("place", "checkpoint", "run", "step", *metrics, "verdict"),
        tuple(_candidate(selection, each, metrics) for each in shown),
        numbers=("place", "step", *metrics),
        strong=(shown.index(chosen),) if chosen else (),
    )
    if len(selection.judged) > len(shown):
        yield Sentence(f"{len(selection.judged) - len(shown)} more are left out.")


def _candidate(selection: Selection, judged: Judged, metrics: Sequence[str]) -> tuple[str, ...]:
    checkpoint = judged.checkpoint
    verdict = "; ".join(map(_failed, judged.failures)) or (
        "meets every condition" if judged.is_good else "has no value"
    )
    return (
        str(selection.judged.index(judged) + 1),
        checkpoint.ref,
        checkpoint.run,
        "" if checkpoint.step is None else str(checkpoint.step),
        *(_number(checkpoint.metric(name)) for name in metrics),
        "recommended" if judged == selection.chosen else verdict,
    )


def _failed(failure: Failure) -> str:
    return f"not {failure.condition}: {'not measured' if failure.found is None else _number(failure.found)}"


# -- how it differs from what is live


def _comparisons(registry: Registry, review: _Review) -> Iterator[Part]:
    if not review.live:
        yield Sentence("Nothing of this adapter is live.")
    environments: dict[str, list[str]] = {}
    for shipment in review.live:
        environments.setdefault(shipment.checkpoint, []).append(shipment.environment)
    for ref, names in environments.items():
        where = " and ".join(sorted(names))
        if ref == review.subject.ref:
            yield Sentence(f"{ref} is live in {where} already.", "good")
            continue
        yield Sentence(f"{review.subject.ref} against {ref}, which is live in {where}")
        try:
            yield from _differences(registry.diff(registry.resolve(ref), review.subject))
        except RegistryError as error:
            yield Sentence(f"They could not be compared: {explain(error).message}", "warning")


def _differences(found: Difference) -> Iterator[Part]:
    metrics = [(each.name, _number(each.one), _number(each.other), _change(each)) for each in found.metrics]
    if metrics:
        yield Table(("metric", "live", "this one", "change"), tuple(metrics), numbers=("live", "this one"))
    fields = tuple((each.name, str(each.one), str(each.other)) for each in found.fields)
    if fields:
        yield Table(("", "live", "this one"), fields)
    compared = [each for each in found.weights if not each.problem and max(each.norms) > 0]
    if not compared:
        return
    far = sorted(compared, key=lambda each: -each.relative)
    middle = statistics.median(each.relative for each in compared)
    yield Sentence(
        f"How far apart their changes are, weight by weight, as a share of the larger change: {middle:.2f} in the middle"
        f" of {len(compared)}. The furthest are:"
    )
    rows = tuple((each.name, f"{each.relative:.2f}", _number(each.cosine)) for each in far[:_MOST_WEIGHTS])
    yield Table(("weight", "distance", "cosine"), rows, numbers=("distance", "cosine"))


def _change(pair: MetricPair) -> str:
    if pair.one is None or pair.other is None or not math.isfinite(pair.other - pair.one):
        return ""
    if not pair.is_like:
        return "measured on other data"
    words = {True: ", better", False: ", worse", None: ""}
    return f"{pair.other - pair.one:+.4g}{words[pair.is_better]}"


# -- what speaks for it


def _evidence(review: _Review) -> Iterator[Part]:
    subject = review.subject
    latest = {metric.name: metric for metric in subject.metrics}
    rows = tuple(
        (name, _number(metric.value), metric.split, "" if metric.step is None else str(metric.step), metric.data[:12])
        for name, metric in sorted(latest.items())
    )
    if rows:
        yield Table(("metric", "value", "split", "step", "data"), rows, numbers=("value", "step"))
    if not any(name.startswith("try/") for name in latest):
        yield Sentence(f"It was not tried before merging: `ckpt try {subject.ref}` does.", "warning")
    for note in reversed(subject.notes):
        yield Quote(note.text, f"{note.author}, {_time(note.created_at)}")


def _lineage(registry: Registry, review: _Review) -> Iterator[Part]:
    details, subject = review.details, review.subject
    rows = [("trained on", subject.base_name, str(subject.base))]
    rows += list(_ancestors(registry, subject))
    rows += [("before it in its run", details.previous, "")] if details.previous else []
    rows += [("after it in its run", details.following, "")] if details.following else []
    rows += [("made of it", child, "") for child in details.children]
    rows += [("merged", f"merged model {each.digest.short}", _time(each.created_at)) for each in details.merged]
    yield Table(("", "what", ""), tuple(rows))


def _ancestors(registry: Registry, subject: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """What it was made of or went on from, and what that was made of, the nearest first."""
    waiting, seen = [subject], {subject.ref}
    while waiting and len(seen) <= _MOST_STEPS_BACK:
        child = waiting.pop(0)
        if child.origin is None:
            continue
        told = "" if child.origin.parents else str(child.origin.detail.get("from", ""))
        for ref in child.origin.parents:
            yield f"{child.ref} made by {child.origin.action} of", ref, ""
            if ref not in seen:
                seen.add(ref)
                waiting.append(registry.resolve(ref))
        if not child.origin.parents:
            yield f"{child.ref} made by {child.origin.action}", told, "not in this registry" if told else ""


def _shipments(review: _Review) -> Iterator[Part]:
    newest = sorted(review.shipments, key=lambda each: -each.number)[:_MOST_SHIPMENTS]
    if not newest:
        yield Sentence("Nothing of this adapter was ever shipped.")
        return
    rows = tuple(
        (
            str(each.number),
            each.environment,
            each.checkpoint,
            _time(each.shipped_at),
            "live" if each.until is None else _time(each.until),
            each.author,
            each.note,
        )
        for each in newest
    )
    yield Table(("no.", "environment", "checkpoint", "from", "until", "by", "note"), rows, numbers=("no.",))


def _compatibility(review: _Review) -> Iterator[Part]:
    found, problem = review.details.report, review.details.problem
    if found is None:
        yield Sentence(f"It could not be checked: {explain(problem).message if problem else ''}", "bad")
        return
    tones: dict[Level, Tone] = {Level.PASS: "good", Level.WARNING: "warning", Level.REFUSED: "bad"}
    yield Sentence(
        f"{found.checkpoint} and {found.base}: {found.verdict.value}, by what the files' headers tell.",
        tones[found.verdict],
    )
    rows = tuple(
        (each.level.value, each.code, each.where, each.expected, each.found, each.advice)
        for each in found.findings
        if each.level is not Level.PASS
    )
    if rows:
        yield Table(("level", "finding", "where", "expected", "found", "advice"), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
