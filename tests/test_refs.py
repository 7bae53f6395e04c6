"""Names and references: what is accepted, what is refused, and that text survives the way there and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidInput, InvalidReference
from registry.refs import AdapterName, CheckpointRef, Digest, check_label, check_name, nearest_name

BOT = AdapterName("", "support-bot")
NAMES = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)
HEX = st.text("0123456789abcdef", min_size=6, max_size=64)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("support-bot", CheckpointRef(BOT)),
        ("support-bot@latest", CheckpointRef(BOT)),
        ("team/support-bot@v12", CheckpointRef(AdapterName("team", "support-bot"), "version", "12")),
        ("support-bot@production", CheckpointRef(BOT, "label", "production")),
        ("support-bot@v0", CheckpointRef(BOT, "label", "v0")),
        ("support-bot@step:0500", CheckpointRef(BOT, "step", "500")),
        ("support-bot@run:lr=1e-4 b", CheckpointRef(BOT, "run", "lr=1e-4 b")),
        ("support-bot@best", CheckpointRef(BOT, "best")),
        ("support-bot@best:eval/loss@5", CheckpointRef(BOT, "best", "eval/loss@5")),
        ("3f9c2a", CheckpointRef(digest_prefix="3f9c2a")),
        ("blake3:3f9c2a7", CheckpointRef(digest_prefix="3f9c2a7")),
        ("3f9c2", CheckpointRef(AdapterName("", "3f9c2"))),
        ("team/3f9c2a7", CheckpointRef(AdapterName("team", "3f9c2a7"))),
    ],
)
def test_every_form_of_a_reference_is_understood(text: str, ref: CheckpointRef) -> None:
    assert CheckpointRef.parse(text) == ref


@pytest.mark.parametrize(
    "text",
    [
        "", "@", "@v1", "a@", "/a", "a/", "a/b/c", "../a", "a..b", "-a", "a-", "a b", "ä", "a\n", "a\0", "a" * 97, "con", "team/nul.txt",
        "3f9c2a@v1", "a@step:", "a@step:x", "a@step:-1", "a@best:", "a@run:", "a@worst:loss", "a@b c", "a@../b", "a@b@c", "a\\b", "٣@v1",
        "a@step:٣",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        CheckpointRef.parse(text)


@given(st.text() | st.from_regex(r"[a-f0-9/@:.v-]{1,12}", fullmatch=True))
def test_random_text_parses_or_is_an_invalid_reference(text: str) -> None:
    try:
        ref = CheckpointRef.parse(text)
    except InvalidReference:
        return
    assert CheckpointRef.parse(str(ref)) == ref


@given(
    NAMES, NAMES | st.just(""), st.sampled_from(["", "@v7", "@step:7", "@run:3", "@best", "@best:x@y", "@candidate"])
)
def test_what_a_reference_prints_means_the_same(name: str, namespace: str, selector: str) -> None:
    text = f"{namespace}/{name}{selector}" if namespace else f"{name}{selector}"
    try:
        ref = CheckpointRef.parse(text)
    except InvalidReference:
        return
    assert str(ref) == text


@given(HEX)
def test_a_prefix_of_a_digest_prints_as_it_was_given(prefix: str) -> None:
    assert str(CheckpointRef.parse(prefix)) == prefix


@given(st.binary(min_size=32, max_size=32))
def test_a_digest_is_read_with_and_without_its_algorithm(raw: bytes) -> None:
    digest = Digest(raw.hex())
    assert Digest.parse(str(digest)) == Digest.parse(raw.hex()) == digest
    assert digest.short == raw.hex()[:12]


@pytest.mark.parametrize("text", ["", "ab" * 31, "AB" * 32, "ab" * 32 + "\n", "sha256:" + "ab" * 32])
def test_a_digest_is_64_lower_case_hex_digits(text: str) -> None:
    with pytest.raises(InvalidInput):
        Digest.parse(text)


@pytest.mark.parametrize("label", ["v1", "v999", "best", "latest", "", "a b", "step:1", "a/b"])
def test_a_label_that_reads_as_something_else_is_refused(label: str) -> None:
    with pytest.raises(InvalidReference):
        check_label(label)


def test_a_label_may_be_any_other_name() -> None:
    assert check_label("production") == "production"
    assert check_name("v1") == "v1"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("my run (2)", "my-run--2"),
        ("..hidden..", "hidden"),
        ("deadbeef", "adapter-deadbeef"),
        ("con", "adapter-con"),
        ("", "adapter"),
        ("größe", "gr--e"),
    ],
)
def test_a_folder_gives_the_nearest_name(text: str, name: str) -> None:
    assert str(nearest_name(text, "adapter")) == name


@given(st.text())
def test_any_folder_gives_a_name(text: str) -> None:
    found = nearest_name(text, "adapter")
    assert AdapterName.parse(str(found)) == found
