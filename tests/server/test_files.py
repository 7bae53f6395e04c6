"""Files on their way out: whole, in ranges, and never as something that a browser would run."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import Server, error


@pytest.fixture
def weights(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def asked(path: str = "adapter_model.safetensors", subject: str = "bot") -> dict[str, str]:
    return {"subject": subject, "path": path}


def test_a_file_is_its_exact_bytes(server: Server, bot: str, weights: bytes) -> None:
    client = server.client("reader")
    entries = {each["path"]: each for each in client.get("/files", params={"subject": bot}).json()}
    answer = client.get("/file", params=asked())
    assert answer.content == weights
    assert answer.headers["Content-Length"] == str(len(weights))
    assert answer.headers["Content-Type"] == "application/octet-stream"
    told = answer.headers["Content-Disposition"]
    assert told.startswith("attachment; filename*=UTF-8''adapter_model.safetensors")
    assert told.endswith('filename="adapter_model.safetensors"')
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert f"blake3:{answer.headers['ETag'].strip(chr(34))}" == entries["adapter_model.safetensors"]["digest"]
    known = client.get("/file", params=asked(), headers={"If-None-Match": answer.headers["ETag"]})
    assert (known.status_code, known.content) == (304, b"")


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [("bytes=0-9", 0, 10), ("bytes=5-", 5, None), ("bytes=-7", -7, None), ("bytes=10-99999999", 10, None)],
)
def test_a_range_is_answered(
    server: Server, bot: str, weights: bytes, wanted: str, start: int, end: int | None
) -> None:
    answer = server.client("reader").get("/file", params=asked(), headers={"Range": wanted})
    expected = weights[start:end]
    assert answer.status_code == 206
    assert answer.content == expected
    first = weights.index(expected)
    assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(expected) - 1}/{len(weights)}"


def test_a_range_beyond_the_end_cannot_be_answered(server: Server, bot: str, weights: bytes) -> None:
    client = server.client("reader")
    for wanted in (f"bytes={len(weights)}-", "bytes=-0", "bytes=9-3"):
        answer = client.get("/file", params=asked(), headers={"Range": wanted})
        assert (answer.status_code, error(answer)) == (416, "range_not_satisfiable")
        assert answer.headers["Content-Range"] == f"bytes */{len(weights)}"


@pytest.mark.parametrize("wanted", ["bytes=0-1,4-5", "lines=1-2", "bytes=-", "bytes=x-y"])
def test_other_ranges_are_passed_over(server: Server, bot: str, weights: bytes, wanted: str) -> None:
    answer = server.client("reader").get("/file", params=asked(), headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (200, weights)


def test_a_range_of_something_else_is_the_whole(server: Server, bot: str, weights: bytes) -> None:
    headers = {"Range": "bytes=0-9", "If-Range": '"else"'}
    assert server.client("reader").get("/file", params=asked(), headers=headers).content == weights


@pytest.mark.parametrize("path", ["nothing", "../adapter_config.json", "/etc/passwd", "adapter_config.json/", ""])
def test_only_files_of_the_manifest_are_given(server: Server, bot: str, path: str) -> None:
    answer = server.client("reader").get("/file", params=asked(path))
    assert (answer.status_code, error(answer)) == (404, "path_not_found")


def test_files_of_a_merged_model(server: Server, bot: str) -> None:
    planned = server.direct.plan(server.direct.resolve(bot))
    merged = server.direct.merge(planned).merged
    client = server.client("reader")
    (shown,) = client.get("/merged").json()
    assert shown["digest"] == str(merged.digest)
    assert client.get("/subject", params={"ref": merged.digest.hex}).json()["kind"] == "merged"
    for entry in client.get("/files", params={"subject": merged.digest.hex}).json():
        answer = client.get("/file", params=asked(entry["path"], merged.digest.hex))
        assert len(answer.content) == entry["size_bytes"]
