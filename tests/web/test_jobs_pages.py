"""Jobs as pages: in a list, one by one, live, stopped and tried again."""

from __future__ import annotations

import fcntl
import gc
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import AsyncGeneratorType

import httpx
import pytest
from running import serving, settings_of
from visiting import Site
from waiting import until

from registry.mixing import Mixture
from registry.server.pages.jobs import Pace, pace
from registry.server.pages.moments import span
from registry.service import Registry
from registry.teamwork import Job


def ordered(site: Site, weight: float = 0.3) -> Job:
    """A merge that was asked for, and is done by the server's process."""
    registry = site.direct.signed_by("writer")
    planned = registry.plan(registry.resolve("support-bot@v1"), mixture=Mixture(weights=(weight,)))
    return registry.start_merge(planned)


def finished(registry: Registry, number: int) -> Job:
    return registry.follow_job(number)


def events(client: httpx.Client, number: int) -> Iterator[tuple[str, str]]:
    with client.stream("GET", f"/jobs/{number}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    for block in text.strip().split("\n\n"):
        name, *lines = block.split("\n")
        yield name.removeprefix("event: "), "\n".join(line.removeprefix("data: ") for line in lines)


def test_a_job_is_watched_until_it_is_over(site: Site) -> None:
    client, job = site.visitor("reader"), ordered(site)
    seen = list(events(client, job.id))
    assert seen[-1][0] == "end"
    last = dict(seen)
    assert ">succeeded<" in last["head"]
    assert "/merged/" in last["body"]
    again = list(events(client, job.id))  # whoever comes back is told everything once more
    assert [name for name, _ in again] == ["head", "body", "log", "end"]
    assert dict(again)["body"] == last["body"]


def test_the_page_says_what_the_events_say(site: Site) -> None:
    client, job = site.visitor("reader"), ordered(site)
    finished(site.direct, job.id)
    shown = client.get(f"/jobs/{job.id}").text
    assert "sse-connect" not in shown
    assert "100 %" in shown
    assert "Try again" not in shown
    assert re.search(r'href="/checkpoints/support-bot@v1"', shown.replace("%40", "@"))


def test_the_list_shows_states_and_passes_over_others(site: Site) -> None:
    client, job = site.visitor("reader"), ordered(site)
    finished(site.direct, job.id)
    assert f'href="/jobs/{job.id}"' in client.get("/jobs").text
    assert f'href="/jobs/{job.id}"' in client.get("/jobs?state=succeeded").text
    assert "No job is failed" in client.get("/jobs?state=failed").text
    assert client.get("/jobs?state=wrong").status_code == 400


def test_what_went_wrong_is_said_with_its_report_and_tried_again_by_writers(site: Site) -> None:
    job = site.direct.start("convert", {"text": "vision/caption@v1", "wanted": {"layout": "litgpt", "name": "copy"}})
    until(lambda: site.direct.job(job.id).state.is_over)
    writer, reader = site.visitor("writer"), site.visitor("reader")
    shown = writer.get(f"/jobs/{job.id}").text
    assert "cannot be written as" in shown
    assert "Try again" in shown
    assert "Try again" not in reader.get(f"/jobs/{job.id}").text
    assert reader.post(f"/jobs/{job.id}/retry").status_code == 403
    answer = writer.post(f"/jobs/{job.id}/retry")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{job.id}")
    assert site.direct.job(job.id).attempts >= 1


def test_a_job_that_is_over_is_not_stopped(site: Site) -> None:
    job = ordered(site)
    finished(site.direct, job.id)
    answer = site.visitor("writer").post(f"/jobs/{job.id}/cancel")
    assert answer.status_code == 409
    assert "That did not work" in answer.text


def test_others_jobs_are_not_there(site: Site) -> None:
    job = ordered(site)
    finished(site.direct, job.id)
    client = site.visitor("nlu")
    assert f"/jobs/{job.id}" not in client.get("/jobs").text
    for path in (f"/jobs/{job.id}", f"/jobs/{job.id}/events", "/jobs/999999", "/jobs/x", "/jobs/99999999999999999999"):
        assert client.get(path).status_code == 404, path


@pytest.fixture
def idle_site(tmp_path: Path, filled_home: tuple[Path, dict[str, str]]) -> Iterator[Site]:
    """A server that does no jobs: another process has that turn."""
    template, secrets = filled_home
    shutil.copytree(template, tmp_path / "idle")
    with (tmp_path / "idle" / "jobs.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with serving(settings_of(tmp_path / "idle")) as server:
            yield Site(server, dict(secrets))


def test_many_watchers_leave_threads_for_others(idle_site: Site) -> None:
    job, client = ordered(idle_site), idle_site.visitor("writer")
    with httpx.Client(base_url=idle_site.url, cookies=client.cookies, limits=httpx.Limits(), timeout=60) as many:
        watching = [many.send(many.build_request("GET", f"/jobs/{job.id}/events"), stream=True) for _ in range(100)]
        assert all(client.get("/jobs").status_code == 200 for _ in range(5))
        assert client.post(f"/jobs/{job.id}/cancel").status_code == 303
        for each in watching:
            assert "event: end" in "".join(each.iter_text())


def watchers() -> int:
    """How many streams of events are alive in this process, which the server is part of."""
    found = [each for each in gc.get_objects() if type(each) is AsyncGeneratorType]
    return sum(each.ag_frame is not None and each.ag_code.co_filename.endswith("pages/jobs.py") for each in found)


def test_nothing_is_looked_up_for_who_has_gone(idle_site: Site) -> None:
    job, client = ordered(idle_site), idle_site.visitor("reader")
    with client.stream("GET", f"/jobs/{job.id}/events") as answer:
        told = answer.iter_text()  # which ends the answer when it is dropped
        assert "event: head" in next(told)
        assert watchers() == 1
    until(lambda: not watchers())


def test_the_files_that_workers_share_are_shown(idle_site: Site) -> None:
    with idle_site.direct.workspace.writing() as change:
        job = change.catalog.jobs.add("merge", "a & b", {}, author="writer", files=[("one<1>", 10), ("two", 30)])
        change.catalog.jobs.claim(job.id, "far-away", 0)
    shown = idle_site.visitor("reader").get(f"/jobs/{job.id}").text
    for words in ("one&lt;1&gt;", "far-away", 'aria-label="two"', "Tries"):
        assert words in shown


def test_a_job_in_the_queue_can_be_stopped_and_asked_for_again(idle_site: Site) -> None:
    job, client = ordered(idle_site), idle_site.visitor("writer")
    shown = client.get(f"/jobs/{job.id}").text
    assert f'sse-connect="/jobs/{job.id}/events"' in shown
    assert 'http-equiv="refresh"' in shown
    client.post(f"/jobs/{job.id}/cancel")
    assert "Try again" in client.get(f"/jobs/{job.id}").text
    client.post(f"/jobs/{job.id}/retry")
    assert idle_site.direct.job(job.id).state == "queued"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.42, "0.4 s"), (12, "12 s"), (125, "2 min 5 s"), (11_520, "3 h 12 min")]
)
def test_spans_are_words(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_a_job_that_has_not_begun_has_no_pace(site: Site) -> None:
    with site.direct.workspace.writing() as change:
        job = change.catalog.jobs.add("diff", "a, b", {"one": "a", "other": "b"}, author="writer")
    assert pace(job) == Pace(rate=None, left_seconds=None)
