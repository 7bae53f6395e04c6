"""Filter expressions: what they accept, what they mean, and where errors are."""

from __future__ import annotations

import math
import re
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from factories import NOON, checkpoint
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidFilter
from registry.filters import (
    MAX_CHARACTERS,
    MAX_NESTING,
    And,
    Comparison,
    Exists,
    Field,
    Filter,
    Node,
    Not,
    Or,
    parse_filter,
)
from registry.manifest import Checkpoint, Format

FULL = checkpoint(
    adapter="team/support-bot",
    version=12,
    run="Nightly-3",
    step=200,
    rank=16,
    alpha=32.0,
    parameters=5000,
    size_bytes=4096,
    method="dora",
    format=Format.LITGPT,
    dtype="bfloat16",
    base_name="meta/llama",
    author="ada",
    arch_version="v2",
    created_at=NOON,
    aliases=("candidate", "weekly"),
    tags={"team": "nlu", "seed": "7", "odd key": "x", "empty": "", "quote": "it's", "or": "o"},
    metrics={
        "eval_loss": 0.5,
        "val/loss": 0.25,
        "pass@1": 0.75,
        "a.b-c": 1.0,
        "nan": math.nan,
        "inf": math.inf,
        "5shot": 5.0,
    },
)
BARE = checkpoint(step=None, rank=None, alpha=None, run="", author="", arch_version="")

MATCHING = """
metric.eval_loss < 0.9 and tag.team = 'nlu' and step >= 200
metric.eval_loss = 0.5
metrics.eval_loss == 5e-1
metric.eval_loss != .4
metric.eval_loss > -2
metric.5shot = 5.
metric."val/loss" < 1
metric.`pass@1` >= 0.75
metric."a.b-c" <= 1
metric.inf > 1e300
step = 200
step = 1 or step < 2.01E2
version = 12
rank = 16
alpha = 32
parameters >= 5000
size = 4096
adapter = 'team/support-bot'
adapter like '%/SUPPORT%'
adapter < 'u'
run = "Nightly-3"
run like 'nightly-_'
run != 'nightly-3'
base = 'meta/llama'
method in ('lora', 'dora')
method in ('dora')
format = 'litgpt'
dtype = 'bfloat16'
author = 'ada'
arch_version = 'v2'
alias = 'candidate'
alias = 'weekly'
alias != 'production'
alias in ('x', 'weekly')
alias like 'week%'
alias is not null
tag.team = "nlu"
tags.team like 'N_U'
tag."odd key" = 'x'
tag.`odd key` = 'x'
tag.quote = 'it''s'
tag.quote = "it's"
tag.or = 'o'
tag.empty = ''
tag.empty is not null
tag.seed = 7
tag.seed = 7.0
tag.seed < 10
tag.seed != 8
tag.seed = '7'
tag.seed in ('x', 7)
tag.nobody is null
metric.nobody is null
metric.nan is null
metric.inf is not null
created = '2025-03-01T12:00:00Z'
created = '2025-03-01T12:00'
created = '2025-03-01T14:00:00+02:00'
created > '2025-03-01'
created < '2025-03-02'
created >= "2025-03-01 11:59:59"
created in ('2025-03-01', '2025-03-01T12:00:00')
not step = 1
not not step = 200
NOT (step = 1 OR version = 1)
step = 200 or step = 1 and version = 1
(step = 200 or step = 1) and version = 12
not step = 1 and version = 12
step=200and(version=12)
step IS NOT NULL AND run Like 'N%'
"""

REJECTING = """
metric.eval_loss > 0.9 and tag.team = 'nlu'
metric.eval_loss is null
metric.eval_LOSS = 0.5
step > 200
step = 200 and version = 1
(step = 200 or step = 1) and version = 1
not (step = 200)
not step = 200 or version = 1
adapter = 'team/Support-bot'
run like 'nightly'
run like 'nightly-3_'
run like ''
base = 'meta.llama'
base like 'meta.llama'
method in ('lora', 'ia3')
alias = 'production'
alias != 'candidate'
alias like 'eek%'
tag.team != 'nlu'
tag.team < 5
tag.team != 5
tag.team in (1, 'x')
tag.seed = '7.0'
tag.seed > 7
tag.empty is null
created < '2025-03-01'
created != '2025-03-01T12:00:00'
created > '2025-03-01T12:00'
metric.nan = 1
metric.nan != 1
metric.nan < 1
metric.nan is not null
metric.nobody != 1
metric.nobody in (1)
tag.nobody != 'x'
tag.nobody like '%'
"""


@pytest.mark.parametrize("text", MATCHING.strip().splitlines())
def test_filters_that_match(text: str) -> None:
    assert parse_filter(text).matches(FULL)


@pytest.mark.parametrize("text", REJECTING.strip().splitlines())
def test_filters_that_do_not_match(text: str) -> None:
    assert not parse_filter(text).matches(FULL)


@pytest.mark.parametrize("name", ["step", "rank", "alpha", "metric.loss"])
@pytest.mark.parametrize("operator", ["=", "!=", "<", "<=", ">", ">="])
def test_a_missing_number_makes_every_comparison_false(name: str, operator: str) -> None:
    assert not parse_filter(f"{name} {operator} 1").matches(BARE)
    assert parse_filter(f"not {name} {operator} 1 and {name} is null").matches(BARE)


@pytest.mark.parametrize("name", ["run", "author", "arch_version", "alias", "tag.team"])
@pytest.mark.parametrize("comparison", ["= ''", "!= 'x'", "< 'x'", "> ''", "like '%'", "in ('', 'x')"])
def test_missing_text_makes_every_comparison_false(name: str, comparison: str) -> None:
    assert not parse_filter(f"{name} {comparison}").matches(BARE)
    assert parse_filter(f"{name} is null and not {name} is not null").matches(BARE)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("%", "x", True),
        ("%%", "x", True),
        ("_", "xy", False),
        ("a%", "Abc", True),
        ("%c", "abC", True),
        ("a%c", "abcbc", True),
        ("a%b%c", "aXbYbZc", True),
        ("a%b%c", "acb", False),
        ("a%a", "a", False),
        ("%b_%", "ab", False),
        ("%b_%", "abc", True),
        ("x.y", "xzy", False),
        (r"x\d[a]*", r"x\d[a]*", True),
        ("a_c", "a\nc", True),
        ("a%c", "a\n\nc", True),
        ("äB%", "äbc", True),
        ("ÄB%", "äbc", False),
        ("K", "\u212a", False),
    ],
)
def test_like(pattern: str, text: str, expected: bool) -> None:
    assert parse_filter(f"tag.x like '{pattern}'").matches(checkpoint(tags={"x": text})) is expected


def test_like_takes_no_exponential_time() -> None:
    hostile = parse_filter(f"tag.x like '{'%a' * 200}%b'")
    begin = time.thread_time()
    assert not hostile.matches(checkpoint(tags={"x": "a" * 2000}))
    assert time.thread_time() - begin < 5


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("", 0, r"expected not, \( or a name: metric\.NAME, tag\.KEY, step, .*, found the end"),
        ("   ", 3, "found the end"),
        ("and", 0, r"metric\.NAME, .* found 'and'"),
        ("stepp > 1", 0, r"expected metric\.NAME, tag\.KEY, step, .*, created, found 'stepp' \(did you mean step\?\)"),
        ("step > 1 and qqq = 1", 13, r"found 'qqq'$"),
        ("metrc.loss > 1", 0, r"found 'metrc\.loss'"),
        ("q" * 99, 0, "found 'q{40}…'$"),
        ("step.x = 1", 0, r"found 'step\.x'"),
        ("'step' = 1", 0, "found 'step'"),
        ("metric < 1", 7, r"a key right after metric, as in metric\.loss .*, found '<'"),
        ("tag. = 'x'", 3, r"a key right after tag, .*, found '\.'"),
        ('metric."" < 1', 6, "a key right after metric"),
        ('metric."x < 1', 6, "a key right after metric"),
        ("metric.val/loss < 1", 10, r"found '/'; a key with other characters needs quotes: metric\.\"val/loss\""),
        ("tag.a-b = 'x'", 5, r"needs quotes: tag\.\"val/loss\""),
        ("step", 4, "expected is or one of = != < <= > >= in after step, found the end"),
        ("tag.x", 5, "expected is or one of = != < <= > >= like in after tag.x, found the end"),
        ("step ~ 1", 5, "expected is or one of .* found '~'"),
        ("step < = 1", 7, "expected a number for step, found '='"),
        ("step '=' 1", 5, "expected is or one of .* found '='"),
        ("step like '1'", 5, "expected is or one of = != < <= > >= in after step, found 'like'"),
        ("created like '2025%'", 8, "found 'like'"),
        ("step not in (1)", 5, "found 'not'"),
        ("step > 'x'", 7, "expected a number for step, found 'x'"),
        ("metric.loss = 'a'", 14, "expected a number for metric.loss, found 'a'"),
        ("metric.loss in (1, 'a')", 19, "expected a number for metric.loss, found 'a'"),
        ("adapter = 5", 10, "expected text in quotes for adapter, found '5'"),
        ("adapter = bot", 10, "expected text in quotes for adapter, found 'bot'"),
        ("tag.x like 5", 11, "expected text in quotes for tag.x, found '5'"),
        ("tag.x = nlu", 8, "expected a number or text in quotes for tag.x, found 'nlu'"),
        ("step = version", 7, "expected a number for step, found 'version'"),
        ("step = null", 7, "expected a number for step, found 'null'"),
        ("step = - 2", 7, "expected a number for step, found '-'"),
        ("step = 1e999", 7, "expected a number that fits"),
        ("created > 5", 10, "expected an ISO 8601 date or time in quotes for created, found '5'"),
        ("created > 'monday'", 10, "expected an ISO 8601 date or time in quotes, found 'monday'"),
        ("created > '2025-02-30'", 10, "ISO 8601"),
        ("adapter = 'x", 10, "found a quote that is not closed"),
        ('adapter = "x', 10, "found a quote that is not closed"),
        ("step is", 7, "expected null, not null, found the end"),
        ("step is 5", 8, "expected null, not null, found '5'"),
        ("step is not 5", 12, "expected null, found '5'"),
        ("step in 5", 8, r"expected \( and a list of values, found '5'"),
        ("step in ()", 9, r"expected a number for step, found '\)'"),
        ("step in (1, )", 12, r"expected a number for step, found '\)'"),
        ("step in (1 2)", 11, r"expected a comma, \), found '2'"),
        ("step in (1", 10, r"expected a comma, \), found the end"),
        ("step = 1 step = 2", 9, "expected and, or, the end, found 'step'"),
        ("step = 1)", 8, r"expected and, or, the end, found '\)'"),
        ("size > 10MB", 9, "expected and, or, the end, found 'MB'"),
        ("(step = 1", 9, r"expected and, or, \), found the end"),
        ("(step = 1 step", 10, r"expected and, or, \), found 'step'"),
        ("()", 1, r"expected not, \( or a name"),
        ("not", 3, r"expected not, \( or a name"),
        ("step = 1 and", 12, r"expected not, \( or a name"),
        ("step = 1; drop", 8, "expected and, or, the end, found ';'"),
        ("step = 1 ☃", 9, "found '☃'"),
        (f"step = '{'x' * 99}'", 7, "found 'x{39}…$"),
    ],
)
def test_errors_say_where_and_what_was_expected(text: str, position: int, reason: str) -> None:
    with pytest.raises(InvalidFilter) as caught:
        parse_filter(text)
    assert re.search(reason, caught.value.reason)
    assert (caught.value.field, caught.value.value, caught.value.position) == ("where", text, position)


def test_the_first_error_is_the_one_reported() -> None:
    with pytest.raises(InvalidFilter) as caught:
        parse_filter("step >> 1 and 'open")
    assert caught.value.position == 6


@pytest.mark.parametrize(("opening", "closing"), [("(", ")"), ("not ", "")])
def test_nesting_is_limited(opening: str, closing: str) -> None:
    assert parse_filter(opening * MAX_NESTING + "step = 200" + closing * MAX_NESTING).matches(FULL)
    with pytest.raises(InvalidFilter, match="at most 50 levels") as caught:
        parse_filter(opening * (MAX_NESTING + 1) + "step = 200" + closing * (MAX_NESTING + 1))
    assert caught.value.position == len(opening) * MAX_NESTING


def test_nesting_ends_with_its_parentheses() -> None:
    assert parse_filter(" and ".join(["(not step = 1)"] * 200)).matches(FULL)


def test_length_is_limited() -> None:
    longest = "step = 200".ljust(MAX_CHARACTERS)
    assert parse_filter(longest).matches(FULL)
    with pytest.raises(InvalidFilter, match="at most 10000 characters, found 10001") as caught:
        parse_filter(f"{longest} ")
    assert caught.value.position == MAX_CHARACTERS


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("metrics.loss==5e-1", "metric.loss = 0.5"),
        ("tags.`a\"b`='it''s'", "tag.\"a\"\"b\" = 'it''s'"),
        ("step in(1,2.5)", "step in (1, 2.5)"),
        ("created>'2025-03-01'", "created > '2025-03-01T00:00:00+00:00'"),
        ("not step is not null", "step is null"),
        ("not(step=1 or not(rank=1 and step=2))", "not (step = 1 or not (rank = 1 and step = 2))"),
        ("((step=1 and rank=1) or (step=2))", "step = 1 and rank = 1 or step = 2"),
    ],
)
def test_a_filter_is_shown_in_one_way(text: str, shown: str) -> None:
    assert str(parse_filter(text)) == shown


# --- properties

FRAGMENTS = (
    "and or not in is null like ( ) , = == != < <= > >= ' '' \" ` . - metric metric. metric.loss tag. tag.a tags.`b` step adapter created "
    "alias 'x' '2025-03-01' 1 -2 1e-3 .5 1e999 9999-12-31 \\ ; \x00 é"
)
PIECES = st.lists(st.sampled_from(FRAGMENTS.split()), max_size=25)


@given(st.text(max_size=60) | PIECES.map(" ".join) | PIECES.map("".join))
def test_any_text_is_a_filter_or_an_invalid_filter(text: str) -> None:
    invalid: InvalidFilter | None = None
    try:
        parsed = parse_filter(text)
    except InvalidFilter as error:
        invalid = error
    if invalid:
        assert 0 <= invalid.position <= len(text)
        assert invalid.reason.startswith("expected ")
    else:
        assert parse_filter(str(parsed)) == parsed


KEYS = st.sampled_from(["loss", "val/loss"]) | st.text(min_size=1, max_size=5)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-3, 3).map(float)
TEXTS = st.sampled_from(["x", "7", ""]) | st.text(max_size=5)
TIMES = st.datetimes(
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=-11, minutes=-30)), timezone(timedelta(hours=14))])
)
FIELDS = st.one_of(
    KEYS.map(lambda key: Field("metric", key)),
    KEYS.map(lambda key: Field("tag", key)),
    st.sampled_from([Field(name) for name in ("step", "rank", "run", "alias", "created")]),
)
VALUES: dict[str, st.SearchStrategy[Any]] = {"number": NUMBERS, "text": TEXTS, "time": TIMES, "tag": NUMBERS | TEXTS}


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    field = draw(FIELDS)
    operator = draw(st.sampled_from(["=", "!=", "<", "<=", ">", ">=", "in", "like"]))
    if operator == "like":
        field = Field("tag", field.key) if field.key else Field("run")
        return Comparison(field, operator, (draw(TEXTS),))
    values = draw(st.lists(VALUES[field.kind], min_size=1, max_size=3 if operator == "in" else 1))
    return Comparison(field, operator, tuple(values))


def compound(parts: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    several = st.lists(parts, min_size=2, max_size=3).map(tuple)
    return parts.map(Not) | several.map(And) | several.map(Or)


NODES: st.SearchStrategy[Node] = st.recursive(comparisons() | FIELDS.map(Exists), compound, max_leaves=8)
CHECKPOINTS: st.SearchStrategy[Checkpoint] = st.builds(
    checkpoint,
    step=st.none() | st.integers(0, 3),
    rank=st.none() | st.integers(1, 3),
    run=TEXTS,
    aliases=st.lists(TEXTS, max_size=2).map(tuple),
    tags=st.dictionaries(KEYS, TEXTS, max_size=3),
    metrics=st.dictionaries(KEYS, st.floats() | st.sampled_from([0.0, 1.0]), max_size=3),
    created_at=TIMES,
)


@given(NODES)
def test_a_filter_shown_as_text_parses_back_to_itself(node: Node) -> None:
    assert parse_filter(str(Filter(node))) == Filter(node)


@given(a=NODES, b=NODES, subject=CHECKPOINTS)
def test_de_morgan(a: Node, b: Node, subject: Checkpoint) -> None:
    left, right = parse_filter(f"not (({a}) and ({b}))"), parse_filter(f"not ({a}) or not ({b})")
    assert left.matches(subject) == right.matches(subject)
    left, right = parse_filter(f"not (({a}) or ({b}))"), parse_filter(f"not ({a}) and not ({b})")
    assert left.matches(subject) == right.matches(subject)


@given(first=comparisons(), subject=CHECKPOINTS)
def test_a_comparison_needs_a_value(first: Comparison, subject: Checkpoint) -> None:
    assert Exists(first.field).matches(subject) or not first.matches(subject)


@given(number=NUMBERS, found=st.floats())
def test_numbers_compare_as_python_compares_them(number: float, found: float) -> None:
    subject = checkpoint(metrics={"m": found})
    expected = {
        "=": found == number,
        "<": found < number,
        "<=": found <= number,
        ">": found > number,
        ">=": found >= number,
    }
    expected["!="] = found != number and not math.isnan(found)
    for operator, holds in expected.items():
        assert parse_filter(f"metric.m {operator} {number!r}").matches(subject) is holds


@given(time=TIMES, found=TIMES)
def test_times_compare_as_moments(time: datetime, found: datetime) -> None:
    subject = checkpoint(created_at=found)
    assert parse_filter(f"created < '{time.isoformat()}'").matches(subject) is (found < time)
    assert parse_filter(f"created = '{time.isoformat()}'").matches(subject) is (found == time)


def test_a_pattern_has_its_limit() -> None:
    parse_filter(f"run like '{'%' * 900}'")
    with pytest.raises(InvalidFilter, match="at most 1000 characters after like"):
        parse_filter(f"run like '{'%' * 1000}'")
