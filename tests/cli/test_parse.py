"""What users type."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cli import output, parse
from registry.errors import InvalidInput

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


@pytest.mark.parametrize("text", ["2026-05-03", "3 May 2026", "3 May", "May 3", "3 may", "3.05.2026", "May 3, 2026"])
def test_a_day_means_its_end_on_the_users_calendar(text: str) -> None:
    found = parse.point_in_time(text, NOW).astimezone()
    assert (found.year, found.month, found.day, found.hour, found.minute) == (2026, 5, 3, 23, 59)


def test_a_day_without_year_is_the_last_one() -> None:
    assert parse.point_in_time("24 December", NOW).astimezone().year == 2025


def test_moments() -> None:
    assert parse.point_in_time("2026-05-03T14:00Z", NOW) == datetime(2026, 5, 3, 14, tzinfo=UTC)
    assert parse.point_in_time("2026-05-03T14:00+02:00", NOW) == datetime(2026, 5, 3, 12, tzinfo=UTC)
    assert parse.point_in_time("yesterday", NOW).astimezone().day == (NOW.astimezone() - timedelta(days=1)).day


@pytest.mark.parametrize("text", ["", "soon", "31 February", "2026-13-01", "25:00"])
def test_no_time(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse.point_in_time(text, NOW)


def test_pairs_and_durations() -> None:
    assert parse.pairs(["a=b=c", " d = "], "tag") == {"a": "b=c", "d": ""}
    assert parse.duration("90min") == timedelta(minutes=90)
    assert parse.duration("7d") == timedelta(days=7)
    for text in (["a"], ["=b"], ["a=1", "a=2"]):
        with pytest.raises(InvalidInput):
            parse.pairs(text, "tag")


def test_numbers_for_people() -> None:
    assert [output.size(n) for n in (0, 999, 1000, 2_200_000_000, 123_456_789)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.2 GB",
        "123 MB",
    ]
    assert [output.count(n) for n in (7, 17_920, 1_100_000_000)] == ["7", "17.9k", "1.1B"]
