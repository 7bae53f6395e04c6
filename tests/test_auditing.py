"""The history as a chain: every change writes exactly its events, many at once make one chain, and copies kept elsewhere show tampering."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny

from registry import auditing, connect
from registry.auditing import AuditCheckpoint
from registry.chain import AuditState, walk
from registry.combining import Making
from registry.errors import Changed, Conflict, CorruptFile, InvalidInput, PathNotFound
from registry.manifest import Checkpoint, Event, Metric
from registry.registering import Registration
from registry.service import Registry
from registry.settings import Settings
from registry.teamwork import Role

NOON = datetime(2026, 5, 3, 12, tzinfo=UTC)


@pytest.fixture
def bot(ckpt: Registry, adapter: Path) -> Checkpoint:
    return ckpt.register(str(adapter)).registered[0].checkpoint


@pytest.fixture
def told(ckpt: Registry, bot: Checkpoint) -> Registry:
    """A registry with a base, a checkpoint, six notes and a metric that is no number."""
    for number in range(6):
        ckpt.note(bot, f"note {number} \N{SNOWMAN}")
    ckpt.add_metrics(bot, [Metric(name="loss", value=float("nan")), Metric(name="top", value=1e300)])
    return ckpt


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private P-256 key and its public one, in PEM."""
    return make_keys(tmp_path_factory.mktemp("keys"))


def make_keys(folder: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def export(ckpt: Registry, target: Path, key: Path | None = None) -> auditing.SignedCheckpoint:
    return auditing.export(ckpt.export_audit(), target, origin="here", at=NOON, key=key)


def database(ckpt: Registry) -> sqlite3.Connection:
    return sqlite3.connect(ckpt.settings.home / "ckpt.db")


# -- export and checkpoints


def test_an_export_holds_every_event_and_how_far_they_go(told: Registry, tmp_path: Path) -> None:
    signed = export(told, tmp_path / "audit.jsonl")
    *lines, last = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    events = told.history()
    assert [line["number"] for line in lines] == [event.number for event in events]
    assert signed.checkpoint == AuditCheckpoint(origin="here", size=len(events), root=events[-1].hash, at=NOON)
    assert last["checkpoint"]["root"] == events[-1].hash
    assert (last["key"], last["signature"]) == ("", "")
    assert auditing.read_checkpoint(tmp_path / "audit.jsonl") == signed
    (tmp_path / "alone.json").write_text((tmp_path / "audit.jsonl").read_text().splitlines()[-1])
    assert auditing.read_checkpoint(tmp_path / "alone.json") == signed
    with pytest.raises(Conflict):
        export(told, tmp_path / "audit.jsonl")


def test_what_was_written_down_is_found_again_when_more_has_happened(
    told: Registry, bot: Checkpoint, tmp_path: Path
) -> None:
    early = export(told, tmp_path / "early").checkpoint
    told.note(bot, "more")
    late = export(told, tmp_path / "late").checkpoint
    state = auditing.check(told.export_audit(), [late, early])
    assert state == told.verify_chain() == AuditState(count=late.size, hash=late.root)
    assert late.size == early.size + 1


def test_a_cut_off_end_and_a_rewritten_chain_are_seen(told: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    known = export(told, tmp_path / "audit.jsonl").checkpoint
    with database(told) as connection:
        connection.execute("DELETE FROM events WHERE number > ?", (known.size - 1,))
    told.verify_chain()  # the chain itself does not show it
    with pytest.raises(Changed, match="at least"):
        auditing.check(told.export_audit(), [known])
    told.note(bot, "other words in its place")
    assert told.verify_chain().count == known.size
    with pytest.raises(Changed, match=known.root):
        auditing.check(told.export_audit(), [known])


def test_a_database_without_any_event_does_not_pass_for_one(ckpt: Registry, tmp_path: Path) -> None:
    nothing = export(ckpt, tmp_path / "audit.jsonl").checkpoint
    assert auditing.check(ckpt.export_audit(), [nothing]).count == 0
    with pytest.raises(Changed):
        auditing.check(ckpt.export_audit(), [AuditCheckpoint(origin="", size=1, root="0" * 64, at=NOON)])


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE events SET author = 'eve' WHERE number = 3",
        "UPDATE events SET about = 'eve' WHERE number = 3",
        "DELETE FROM events WHERE number = 3",
    ],
)
def test_an_unsound_chain_is_not_exported_or_passed(told: Registry, tmp_path: Path, change: str) -> None:
    with database(told) as connection:
        connection.execute(change)
    with pytest.raises(Changed, match="event 3"):
        told.verify_chain()
    if "about" not in change:  # which is for looking up; an export has what it follows from
        with pytest.raises(Changed, match="event 3"):
            export(told, tmp_path / "audit.jsonl")
        assert not list(tmp_path.glob("*audit*"))


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda lines: [*lines[:2], lines[2].replace("ada", "eve"), *lines[3:]], Changed),
        (lambda lines: [*lines[:2], *lines[3:]], Changed),
        (lambda lines: [*lines[:-2], lines[-1]], Changed),
        (lambda lines: lines[:-1], CorruptFile),
        (lambda lines: [*lines, lines[0]], CorruptFile),
        (lambda lines: ["[]"], CorruptFile),
        (lambda lines: [lines[0][:20]], CorruptFile),
        (lambda lines: ['{"checkpoint": 3}'], InvalidInput),
    ],
    ids=["changed", "one missing", "last missing", "cut off", "continued", "no objects", "no JSON", "no checkpoint"],
)
def test_an_export_that_was_changed_is_refused(
    told: Registry, tmp_path: Path, edit: Callable[[list[str]], list[str]], error: type[Exception]
) -> None:
    export(told, tmp_path / "audit.jsonl")
    (tmp_path / "edited").write_text("\n".join(edit((tmp_path / "audit.jsonl").read_text().splitlines())))
    with pytest.raises(error):
        auditing.read_checkpoint(tmp_path / "edited")


def test_a_signed_checkpoint_is_checked_with_its_public_key(
    told: Registry, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    signed = export(told, tmp_path / "audit.jsonl", private)
    assert auditing.read_checkpoint(tmp_path / "audit.jsonl", public) == signed
    _, strange = make_keys(tmp_path)
    with pytest.raises(Changed, match="a signature by the key"):
        auditing.read_checkpoint(tmp_path / "audit.jsonl", strange)
    edited = json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[-1])
    edited["checkpoint"]["size"] -= 1
    (tmp_path / "edited").write_text(json.dumps(edited))
    with pytest.raises(Changed):
        auditing.read_checkpoint(tmp_path / "edited", public)
    export(told, tmp_path / "unsigned")
    with pytest.raises(Changed, match="none"):
        auditing.read_checkpoint(tmp_path / "unsigned", public)


def test_openssl_checks_the_signature_too(told: Registry, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """What the documentation says to do where `ckpt` is not at hand."""
    import base64

    from registry.manifest import canonical_json

    private, public = keys
    export(told, tmp_path / "audit.jsonl", private)
    last = json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[-1])
    (tmp_path / "text").write_bytes(canonical_json(last["checkpoint"]))
    (tmp_path / "signature").write_bytes(base64.b64decode(last["signature"]))
    subprocess.run(
        ["openssl", "dgst", "-sha256", "-verify", str(public), "-signature", tmp_path / "signature", tmp_path / "text"],
        check=True,
        capture_output=True,
    )


def test_other_keys_are_refused(told: Registry, keys: tuple[Path, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    other = ed25519.Ed25519PrivateKey.generate()
    pem = other.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ed25519.pem").write_bytes(pem)
    (tmp_path / "none.pem").write_bytes(b"hello")
    for name in ("ed25519.pem", "none.pem"):
        with pytest.raises(InvalidInput):
            export(told, tmp_path / "audit.jsonl", tmp_path / name)
    with pytest.raises(PathNotFound):
        export(told, tmp_path / "audit.jsonl", tmp_path / "missing.pem")
    assert not (tmp_path / "audit.jsonl").exists()


# -- history by author and time


def test_history_by_author_time_and_subject(told: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    events = told.history()
    assert told.history(since=events[3].at)[0] == events[3]
    assert told.history(author="eve") == []
    told.signed_by("eve").note(bot, "mine")
    (only,) = told.history(author="eve")
    assert (only.action, only.author) == ("note", "eve")
    assert told.history("bot", 1, author="ada", since=events[0].at)[0].action == "metric"
    assert told.history(since=datetime.now(UTC) + timedelta(hours=1)) == []


# -- many at once


@pytest.fixture(params=["embedded", pytest.param("team", marks=pytest.mark.xdist_group("servers"))])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    environment = {"CKPT_HOME": str(tmp_path / "home"), "CKPT_USER": "ada"}
    if request.param == "team":
        environment |= {"CKPT_DATABASE_URL": request.getfixturevalue("postgres_url")}
    with connect(Settings.from_environment(environment)) as opened:
        yield opened


def test_32_threads_write_one_chain(anywhere: Registry, base: Path, adapter: Path) -> None:
    bot = anywhere.register(str(adapter), Registration(base=str(base))).registered[0].checkpoint
    before = anywhere.verify_chain().count
    with ThreadPoolExecutor(32) as threads:
        list(threads.map(lambda number: anywhere.note(bot, f"note {number}"), range(96)))
    assert anywhere.verify_chain().count == before + 96
    assert walk(anywhere.export_audit()) == anywhere.verify_chain()
    texts = {event.detail["text"] for event in anywhere.history("bot") if event.action == "note"}
    assert texts == {note.text for note in anywhere.resolve("bot").notes} == {f"note {n}" for n in range(96)}


def test_a_change_that_fails_leaves_no_event(told: Registry, bot: Checkpoint) -> None:
    told.set_alias(bot, "live")
    before = told.verify_chain()
    for attempt in (
        lambda: told.remove(bot),
        lambda: told.remove_alias("bot", "none"),
        lambda: told.tag(bot, {"a": "b"}, ["missing"]),
        lambda: told.rollback("production"),
    ):
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the reason
            attempt()
    assert told.verify_chain() == before


# -- every verb


def actions(ckpt: Registry, do: Callable[[], Any]) -> list[str]:
    before = len(ckpt.history())
    do()
    return [event.action for event in ckpt.history()[before:]]


# Whose events the test below looks at, and whose are looked at where the verb itself is tested.
READING = {
    "authenticate", "base", "bases", "check", "checkpoints", "close", "deliveries", "details", "diagnose", "diff", "export_audit", "follow_job",
    "history", "job", "job_log", "jobs", "merged", "page", "plan", "provenance", "pull", "rank", "resolve", "settings", "shipments", "shipped",
    "signable_files", "signatures", "signed_by", "subject", "tokens", "trail", "upgrade_database", "verify", "verify_base", "verify_chain",
    "verify_signature", "webhooks", "workspace", "policy", "policies", "select", "repositories", "repository",
    "repository_refs", "read_file", "recipes", "adapters", "series", "metric_names", "best", "load", "history_page",
}  # fmt: skip
CHANGING = {
    "register", "note", "tag", "add_metrics", "set_alias", "remove_alias", "remove", "sweep", "add_base", "merge", "ship", "rollback",
    "combine", "create_token", "revoke_token", "start", "cancel_job", "retry_job", "set_policy", "remove_policy",
    "save_recipe", "remove_recipe",
}  # fmt: skip
CHANGING_ELSEWHERE = {
    "add_signature", "add_webhook", "candidates", "keep", "convert", "extract", "remove_webhook", "separate",
    "sign", "sign_provenance", "start_merge", "test_webhook",
}  # fmt: skip


def test_every_verb_is_known_to_read_or_to_change() -> None:
    verbs = {name for name in vars(Registry) if not name.startswith("_")}
    assert verbs <= READING | CHANGING | CHANGING_ELSEWHERE, "say above which events a new verb writes"


def test_every_changing_verb_writes_exactly_its_event(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    one, two = (str(tiny.write_adapter(tmp_path / name, base=base, seed=len(name))) for name in ("one", "three"))
    said = Registration(base="base")
    assert actions(ckpt, lambda: ckpt.add_base(str(base))) == ["base.add"]
    assert actions(ckpt, lambda: ckpt.add_base(str(base), copy=True)) == ["base.move"]
    assert actions(ckpt, lambda: ckpt.register(one, said)) == ["register"]
    first = ckpt.resolve("one")
    assert actions(ckpt, lambda: ckpt.register(one, said)) == []
    assert actions(ckpt, lambda: ckpt.register(one, Registration(base="base", note="again"))) == ["annotate"]
    assert actions(ckpt, lambda: ckpt.note(first, "fine")) == ["note"]
    assert actions(ckpt, lambda: ckpt.tag(first, {"team": "nlu"})) == ["tag"]
    assert actions(ckpt, lambda: ckpt.add_metrics(first, [Metric(name="loss", value=1.0)])) == ["metric"]
    assert actions(ckpt, lambda: ckpt.set_alias(first, "live")) == ["alias.set"]
    assert actions(ckpt, lambda: ckpt.remove_alias("one", "live")) == ["alias.remove"]
    assert actions(ckpt, lambda: ckpt.ship(first, "production")) == ["ship"]
    ckpt.register(two, Registration(base="base", adapter="one"))
    ckpt.ship(ckpt.resolve("one@v2"), "production")
    assert actions(ckpt, lambda: ckpt.rollback("production")) == ["rollback"]
    assert actions(ckpt, lambda: ckpt.set_policy("one", "loss min")) == ["policy.set"]
    assert actions(ckpt, lambda: ckpt.remove_policy("one")) == ["policy.remove"]
    assert actions(ckpt, lambda: ckpt.save_recipe(ckpt.plan(first))) == ["recipe.save"]
    assert actions(ckpt, lambda: ckpt.save_recipe(ckpt.plan(first))) == []
    assert actions(ckpt, lambda: ckpt.remove_recipe(ckpt.recipes()[0].repository)) == ["recipe.remove"]
    assert actions(ckpt, lambda: ckpt.merge(ckpt.plan(first))) == ["merge"]
    assert actions(ckpt, lambda: ckpt.merge(ckpt.plan(first))) == []
    three = ckpt.register(two, Registration(base="base", adapter="three")).registered[0].checkpoint
    assert actions(ckpt, lambda: ckpt.remove(three)) == ["remove"]
    assert actions(ckpt, lambda: ckpt.sweep(grace=timedelta(0))) == []
    ckpt.register(str(tiny.write_adapter(tmp_path / "four", base=base, seed=9)), said)
    ckpt.remove(ckpt.resolve("four"))
    assert actions(ckpt, lambda: ckpt.sweep(grace=timedelta(0))) == ["sweep"]
    assert actions(ckpt, lambda: ckpt.combine(first, ckpt.resolve("one@v2"), making=Making(adapter="both"))) == [
        "register"
    ]
    assert actions(ckpt, lambda: ckpt.create_token("bob", Role.READER)) == ["token.create"]
    assert actions(ckpt, lambda: ckpt.revoke_token("bob")) == ["token.revoke"]
    assert actions(ckpt, lambda: ckpt.start("verify_base", {"base": "base"})) == ["job.start"]
    (job,) = ckpt.jobs()
    assert actions(ckpt, lambda: ckpt.cancel_job(job.id)) == ["job.cancel"]
    assert actions(ckpt, lambda: ckpt.retry_job(job.id)) == ["job.retry"]
    ckpt.verify_chain()


def test_events_survive_the_way_through_an_export(told: Registry, tmp_path: Path) -> None:
    """Hashes are taken over what any reader gets back: numbers that JSON does not have, and text of all kinds."""
    export(told, tmp_path / "audit.jsonl")
    from registry.codec import from_json

    lines = (tmp_path / "audit.jsonl").read_text().splitlines()[:-1]
    assert walk(from_json(Event, json.loads(line)) for line in lines) == told.verify_chain()


def test_checking_an_export_loads_no_database(tmp_path: Path) -> None:
    """A client has none."""
    program = "import registry.auditing, registry.diagnosing, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"sqlalchemy", "torch", "numpy", "cryptography"} & {
        name.partition(".")[0] for name in done.stdout.split()
    }
