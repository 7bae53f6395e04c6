"""Registering: every layout that trainers leave, what is refused, what doing it again means, and what a crash or a second process leaves."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load_file, save_file

from registry.errors import (
    Changed,
    Conflict,
    CorruptFile,
    InvalidInput,
    NotACheckpoint,
    PathNotFound,
    Refused,
    StorageFailed,
)
from registry.manifest import Metric
from registry.registering import Registration
from registry.service import Registry


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    """A run of the Hugging Face Trainer."""
    return tiny.write_run(tmp_path / "support-bot", base=base)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


# -- layouts


def test_a_peft_folder(ckpt: Registry, adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "tokenizer.json").write_text("{}")
    (intake,) = ckpt.register(str(adapter)).registered
    found = intake.checkpoint
    assert (found.ref, found.run, found.step, found.source, found.author) == (
        "bot@v1",
        "bot",
        None,
        str(adapter),
        "ada",
    )
    manifest = found.manifest
    assert (manifest.method, manifest.rank, manifest.alpha, manifest.scaling) == ("lora", 4, 8.0, "alpha/r")
    assert (manifest.targets, manifest.dtype, manifest.tokenizer) == (("q_proj", "v_proj"), "float32", True)
    assert manifest.parameters == sum(array.size for array in tiny.adapter_tensors().values())
    assert {entry.path for entry in manifest.files} == set(tiny.contents(adapter))
    for entry in manifest.files:
        assert entry.sha256 == hashlib.sha256((adapter / entry.path).read_bytes()).hexdigest()
    assert ckpt.resolve(found.digest.short) == found


def test_a_run_of_the_trainer_in_the_order_of_its_steps(ckpt: Registry, run: Path) -> None:
    found = [each.checkpoint for each in ckpt.register(str(run)).registered]
    assert [(each.version, each.step, each.run) for each in found] == [
        (1, 9, "support-bot"), (2, 50, "support-bot"), (3, 100, "support-bot"), (4, None, "support-bot"),
    ]  # fmt: skip
    measured = [{metric.name: (metric.value, metric.step, metric.split) for metric in each.metrics} for each in found]
    assert measured[0] == {"loss": (1.91, 9, "train"), "eval_loss": (1.41, 9, "eval")}
    assert measured[1] == {"loss": (1.5, 50, "train")}
    assert measured[3] == {}
    assert ckpt.resolve("support-bot@best:eval_loss").step == 100


@pytest.mark.parametrize("by", ["folder", "weights file"])
def test_one_checkpoint_of_a_run(ckpt: Registry, run: Path, by: str) -> None:
    place = run / "checkpoint-50"
    (found,) = ckpt.register(str(place if by == "folder" else place / "adapter_model.safetensors")).registered
    assert (found.checkpoint.ref, found.checkpoint.step, found.checkpoint.source) == ("support-bot@v1", 50, str(place))


def test_the_weights_file_beside_a_run_means_that_checkpoint_alone(ckpt: Registry, run: Path) -> None:
    (found,) = ckpt.register((run / "adapter_model.safetensors").as_uri()).registered
    assert found.checkpoint.source == str(run)
    assert {entry.path for entry in found.checkpoint.manifest.files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_another_file_is_not_a_checkpoint(ckpt: Registry, adapter: Path) -> None:
    (adapter / "README.md").touch()
    with pytest.raises(NotACheckpoint):
        ckpt.register(str(adapter / "README.md"))


def test_a_litgpt_run_with_the_numbers_of_its_log(ckpt: Registry, tmp_path: Path) -> None:
    tiny.write_litgpt_base(tmp_path / "models" / "llama")
    run = tiny.write_litgpt_run(tmp_path / "out" / "lit-bot", base="models/llama")
    (run / "step-000003" / "lit_model.pth").write_bytes(b"a merged model")
    intake = ckpt.register(str(run))
    found = [each.checkpoint for each in intake.registered]
    assert [(each.ref, each.step) for each in found] == [("lit-bot@v1", 3), ("lit-bot@v2", 6), ("lit-bot@v3", 7)]
    assert [each.metric("val_loss") for each in found] == [1.7, 1.4, 0.5]
    assert [each.metric("loss") for each in found] == [0.7, 0.4, 0.3]
    assert (found[0].manifest.method, found[0].manifest.targets, found[0].manifest.rank) == (
        "lora",
        ("query", "value"),
        4,
    )
    assert "lit_model.pth" in intake.registered[0].left_out
    assert "lit_model.pth" not in {entry.path for entry in found[0].manifest.files}


def test_a_single_step_of_a_litgpt_run_is_the_same_checkpoint(ckpt: Registry, tmp_path: Path) -> None:
    tiny.write_litgpt_base(tmp_path / "llama")
    run = tiny.write_litgpt_run(tmp_path / "lit-bot", base="llama")
    for place in (run / "step-000006", run / "step-000006" / "lit_model.pth.lora"):
        (found,) = ckpt.register(str(place)).registered
        assert (found.checkpoint.ref, found.checkpoint.step, found.checkpoint.metric("val_loss")) == (
            "lit-bot@v1",
            6,
            1.4,
        )


def test_whole_models_of_the_trainer_are_base_models(ckpt: Registry, tmp_path: Path) -> None:
    """A full fine-tune leaves them as a run of adapters lies, `checkpoint-N` and the final one around them."""
    run = tiny.write_base(tmp_path / "chat", seed=101)
    for step in (100, 20):
        tiny.write_base(run / f"checkpoint-{step}", seed=step, shards=2)
    intake = ckpt.register(str(run))
    assert [each.base.name for each in intake.models] == ["chat-checkpoint-20", "chat-checkpoint-100", "chat"]
    (again,) = ckpt.register(str(run / "checkpoint-20"), Registration(adapter="chat-checkpoint-20")).models
    assert (again.base.name, again.created) == ("chat-checkpoint-20", False)


def test_names_of_runs_that_are_taken_get_longer(ckpt: Registry, tmp_path: Path) -> None:
    for seed, parent in enumerate(("a", "b")):
        tiny.write_base(tmp_path / parent / "chat" / "final", seed=seed)
    first, second = (ckpt.register(str(tmp_path / parent / "chat")).models[0].base for parent in ("a", "b"))
    assert (first.name, second.name) == ("chat", f"chat-{second.digest.short}")


def test_a_snapshot_in_the_cache_of_the_hub(ckpt: Registry, base: Path, adapter: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--team--support-bot" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(adapter.iterdir()):
        blob = snapshot.parents[1] / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (found,) = ckpt.register(str(snapshot)).registered
    assert found.checkpoint.ref == "team/support-bot@v1"
    (original,) = ckpt.register(str(adapter)).registered
    assert found.checkpoint.digest == original.checkpoint.digest


def test_a_folder_behind_a_url(ckpt: Registry, base: Path, run: Path) -> None:
    memory = MemoryFileSystem()
    memory.put(str(run), "/runs/far-bot", recursive=True)
    try:
        intake = ckpt.register("memory://runs/far-bot")
    finally:
        memory.rm("/runs", recursive=True)
    assert [each.checkpoint.step for each in intake.registered] == [9, 50, 100, None]
    local = ckpt.register(str(run), Registration(adapter="far-bot")).registered
    assert [each.created for each in local] == [False] * 4


def test_identical_files_are_stored_once(ckpt: Registry, run: Path, tmp_path: Path) -> None:
    ckpt.register(str(run))
    assert len(tiny.stored_blobs(tmp_path / "home")) == len(set(tiny.contents(run).values()))


@pytest.mark.parametrize("folder", ["my run (2)", "deadbeef", "con", "größe", "..x", "-"])
def test_any_name_of_a_folder_gives_a_name(ckpt: Registry, adapter: Path, folder: str) -> None:
    moved = adapter.rename(adapter.with_name(folder))
    (found,) = ckpt.register(str(moved)).registered
    assert ckpt.resolve(found.checkpoint.ref) == found.checkpoint
    assert ckpt.resolve(str(found.checkpoint.adapter)) == found.checkpoint


def test_what_the_caller_says_is_recorded(ckpt: Registry, run: Path) -> None:
    said = Registration(
        adapter="team/bot", run="retry", step=7, note="why", tags={"team": "nlu"}, arch_version="v2",
        metrics=(Metric(name="eval_loss", value=0.25), Metric(name="bleu", value=31.0, direction="higher")),
    )  # fmt: skip
    found = ckpt.register(str(run / "checkpoint-9"), said).registered[0].checkpoint
    assert (found.ref, found.run, found.step, found.arch_version) == ("team/bot@v1", "retry", 7, "v2")
    assert {metric.name: metric.value for metric in found.metrics} == {"loss": 1.91, "eval_loss": 0.25, "bleu": 31.0}
    assert [note.text for note in found.notes] == ["why"]
    assert found.tags == {"team": "nlu"}
    assert ckpt.resolve("team/bot@step:7") == found


# -- refused


def test_a_truncated_checkpoint_does_not_cost_the_others(ckpt: Registry, run: Path) -> None:
    truncate(run / "checkpoint-50" / "adapter_model.safetensors")
    intake = ckpt.register(str(run))
    assert [each.checkpoint.step for each in intake.registered] == [9, 100, None]
    assert [type(error) for error in intake.unreadable] == [CorruptFile]
    assert intake.unreadable[0].path == str(run / "checkpoint-50" / "adapter_model.safetensors")


def test_the_only_checkpoint_being_truncated_is_an_error(ckpt: Registry, adapter: Path) -> None:
    truncate(adapter / "adapter_model.safetensors")
    for path in (adapter, adapter / "adapter_model.safetensors"):
        with pytest.raises(CorruptFile):
            ckpt.register(str(path))
    assert not ckpt.checkpoints()


def test_a_misfit_is_refused_with_every_mismatch_and_nothing_is_stored(
    ckpt: Registry, run: Path, tmp_path: Path
) -> None:
    weights = run / "checkpoint-100" / "adapter_model.safetensors"
    tensors = load_file(weights)
    wrong = {name for name in tensors if "q_proj.lora_B" in name}
    save_file({**tensors, **{name: np.ones((tiny.WIDTH + 1, 4), np.float32) for name in wrong}}, weights)
    with pytest.raises(Refused) as caught:
        ckpt.register(str(run))
    where = " ".join(finding.where for finding in caught.value.report.misfits)
    assert all(f"layers.{layer}.self_attn.q_proj" in where for layer in range(tiny.LAYERS))
    assert "v_proj" not in where
    assert not ckpt.checkpoints()
    assert not tiny.stored_blobs(tmp_path / "home")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("nothing", PathNotFound),
        ("empty", NotACheckpoint),
        ("base/config.json", NotACheckpoint),
        ("nosuch://x", StorageFailed),
    ],
)
def test_where_no_checkpoint_is(ckpt: Registry, base: Path, tmp_path: Path, path: str, error: type[Exception]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(error):
        ckpt.register(path if "://" in path else str(tmp_path / path))


@pytest.mark.parametrize(
    "said",
    [
        Registration(adapter="a/b/c"), Registration(run="a b"), Registration(tags={"a b": ""}), Registration(step=5),
        Registration(metrics=(Metric(name="loss", value=1.0),)),
    ],
)  # fmt: skip
def test_words_that_make_no_sense_for_a_run_are_refused_at_once(ckpt: Registry, run: Path, said: Registration) -> None:
    with pytest.raises(InvalidInput):
        ckpt.register(str(run), said)
    assert not ckpt.bases()


def test_an_architecture_version_that_is_not_the_base_s_is_refused(ckpt: Registry, base: Path, adapter: Path) -> None:
    ckpt.add_base(str(base), arch_version="v1")
    for named in ("", "base", str(base)):
        with pytest.raises(Conflict, match="v1"):
            ckpt.register(str(adapter), Registration(arch_version="v2", base=named))
    assert ckpt.register(str(adapter)).registered[0].checkpoint.arch_version == "v1"


@pytest.mark.parametrize(
    "said",
    [
        Registration(step=-1), Registration(step=10**30), Registration(note="\ud800"), Registration(tags={"a": "\ud800"}),
        Registration(base="\ud800"), Registration(metrics=(Metric(name="acc", value=1.0, step=10**30),)), Registration(note="n" * 10**6),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_no_database_can_hold_is_refused(ckpt: Registry, adapter: Path, said: Registration) -> None:
    with pytest.raises(InvalidInput):
        ckpt.register(str(adapter), said)
    assert not ckpt.checkpoints()


def test_a_path_that_is_not_utf_8_is_refused(ckpt: Registry, adapter: Path) -> None:
    latin = Path(os.fsdecode(os.fsencode(adapter) + b"\xff"))
    adapter.rename(latin)
    with pytest.raises(InvalidInput, match="UTF-8"):
        ckpt.register(str(latin))


# -- again


def test_the_same_content_again_is_the_same_checkpoint(ckpt: Registry, adapter: Path, tmp_path: Path) -> None:
    (first,) = ckpt.register(str(adapter)).registered
    events = len(ckpt.history())
    (again,) = ckpt.register(str(shutil.copytree(adapter, tmp_path / "copy")), Registration(adapter="bot")).registered
    assert (first.created, again.created) == (True, False)
    assert again.checkpoint == first.checkpoint
    assert len(ckpt.history()) == events


def test_what_is_said_anew_is_added(ckpt: Registry, run: Path) -> None:
    place = str(run / "checkpoint-9")
    ckpt.register(place)
    said = Registration(
        metrics=(Metric(name="eval_loss", value=1.0), Metric(name="acc", value=0.9)), note="good", tags={"a": "1"}
    )
    for _ in range(2):
        found = ckpt.register(place, said).registered[0].checkpoint
        assert [metric.value for metric in found.metrics if metric.name == "eval_loss"] == [1.41, 1.0]
        assert (found.metric("acc"), [note.text for note in found.notes], found.tags) == (0.9, ["good"], {"a": "1"})
    assert ckpt.register(place).registered[0].checkpoint.metric("eval_loss") == 1.0
    assert [event.action for event in ckpt.history("support-bot")] == ["register", "annotate"]


def test_the_same_content_on_another_base_is_a_conflict(ckpt: Registry, adapter: Path, tmp_path: Path) -> None:
    ckpt.register(str(adapter))
    with pytest.raises(Conflict, match="base"):
        ckpt.register(str(adapter), Registration(base=str(tiny.write_base(tmp_path / "other", seed=1))))


def test_the_same_content_may_belong_to_another_adapter(ckpt: Registry, adapter: Path) -> None:
    ckpt.register(str(adapter))
    assert ckpt.register(str(adapter), Registration(adapter="other")).registered[0].checkpoint.ref == "other@v1"


# -- interrupted, raced, changed

PROGRAM = """
import sys
import tiny
from pathlib import Path
with tiny.open_registry(Path(sys.argv[1])) as ckpt:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(12):
        for path in sys.argv[2:]:
            print([each.checkpoint.ref for each in ckpt.register(path).registered], flush=True)
"""


def start(*arguments: Path) -> subprocess.Popen[str]:
    """A process that registers paths over and over, once it is told to (see `go`)."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def whole(ckpt: Registry, tmp_path: Path) -> list[str]:
    """The references of all checkpoints, each of which can be pulled."""
    found = [checkpoint.ref for checkpoint in ckpt.checkpoints()]
    for ref in found:
        ckpt.pull(ckpt.resolve(ref), tmp_path / "pulled" / f"{ref}-{time.monotonic_ns()}")
    return found


@pytest.mark.parametrize("milliseconds", [20, 60, 110, 170, 240])
def test_killed_while_registering(tmp_path: Path, run: Path, milliseconds: int) -> None:
    process = start(tmp_path / "home", run)
    go(process)
    time.sleep(milliseconds / 1000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with tiny.open_registry(tmp_path / "home") as ckpt:
        before = whole(ckpt, tmp_path)
        assert before == [f"support-bot@v{number + 1}" for number in range(len(before))]
        again = ckpt.register(str(run)).registered
        assert [each.checkpoint.step for each in again] == [9, 50, 100, None]
        assert [each.created for each in again] == [number >= len(before) for number in range(4)]
        assert len(whole(ckpt, tmp_path)) == 4


def test_two_processes_lose_nothing(tmp_path: Path, run: Path, base: Path) -> None:
    others = [tiny.write_run(tmp_path / f"other-{number}", base=base, steps=(number + 1, 50)) for number in range(2)]
    processes = [start(tmp_path / "home", run, other) for other in others]
    for process in processes:
        go(process)
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    with tiny.open_registry(tmp_path / "home") as ckpt:
        assert whole(ckpt, tmp_path) == [
            *(f"other-{number}@v{version}" for number in range(2) for version in (1, 2, 3)),
            *(f"support-bot@v{version}" for version in (1, 2, 3, 4)),
        ]
        assert [event.action for event in ckpt.history()].count("register") == 10
    same_runs = [{line for line in text.splitlines() if "support-bot" in line} for text in printed]
    assert same_runs[0] == same_runs[1]


def at(what: str, act: Callable[[], object]) -> Callable[[str, int, int], None]:
    """A progress that acts the first time that something is being done."""
    left = [act]

    def progress(doing: str, done_bytes: int, total_bytes: int) -> None:
        if re.search(what, doing) and left:
            left.pop()()

    return progress


def test_a_file_that_is_rewritten_after_it_was_checked_is_noticed(ckpt: Registry, adapter: Path) -> None:
    newer = tiny.adapter_tensors(rank=2)
    rewrite = at("fingerprint", lambda: save_file(newer, adapter / "adapter_model.safetensors"))
    with pytest.raises(Changed, match="writing"):
        ckpt.register(str(adapter), progress=rewrite)
    assert not ckpt.checkpoints()


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_found(ckpt: Registry, run: Path) -> None:
    rotate = at("fingerprint", lambda: shutil.rmtree(run / "checkpoint-50"))
    with pytest.raises(PathNotFound):
        ckpt.register(str(run), progress=rotate)
    assert [each.checkpoint.step for each in ckpt.register(str(run)).registered] == [9, 100, None]


def test_progress_counts_every_byte_stored(ckpt: Registry, run: Path) -> None:
    done: list[tuple[int, int]] = []
    intake = ckpt.register(str(run), progress=lambda what, *counts: done.append(counts) if what == "storing" else None)
    total = sum(each.checkpoint.manifest.size_bytes for each in intake.registered)
    assert (sum(count for count, _ in done), {total for _, total in done}) == (total, {total})
