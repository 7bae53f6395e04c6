"""Bad input: one clear sentence, what to do next, the right exit code, no traceback, nothing changed."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commands import Ckpt, Result

import registry.errors
from cli.app import main
from cli.errors import EXIT_CODES, explain
from registry.errors import RegistryError
from registry.tensors import DType, TensorSpec, layout_safetensors


def failed(result: Result, code: int, *texts: str) -> None:
    assert result.code == code, result
    assert code in EXIT_CODES
    assert "Traceback" not in result.err
    for text in texts:
        assert text in result.err, result.err
    assert result.err.count("error:") == 1


def test_paths_that_are_not_checkpoints(ckpt: Ckpt, tmp_path: Path, run_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    failed(ckpt("register", "missing"), 3, "missing: no such file or folder")
    failed(ckpt("register", "empty"), 6, "an empty folder", "PEFT or litgpt")
    failed(ckpt("register", "tiny-llama/config.json"), 6, "adapter_config.json")
    failed(ckpt("register", "tiny-llama", "--note", "good"), 2, "whole model", "base model")
    failed(ckpt("base", "add", str(run_folder / "checkpoint-40")), 6, "an adapter, not a base model")
    failed(ckpt("base", "add", "empty"), 6, "an empty folder")


@pytest.mark.parametrize(("cut", "said"), [(5, "too short"), (200, "does not fit"), (70_000, "tensors end at byte")])
def test_truncated_safetensors(ckpt: Ckpt, run_folder: Path, cut: int, said: str) -> None:
    weights = run_folder / "checkpoint-40" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    failed(ckpt("register", str(run_folder / "checkpoint-40")), 6, "is damaged", said)
    assert ckpt("list").out == ""


def test_one_damaged_checkpoint_does_not_keep_the_run_out(ckpt: Ckpt, run_folder: Path) -> None:
    weights = run_folder / "checkpoint-240" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = ckpt("register", str(run_folder))
    assert result.code == 6
    assert "not registered:" in result.err
    assert len(ckpt("list", "--json").json) == 5


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_pickle_with_code(ckpt: Ckpt, run_folder: Path, tmp_path: Path) -> None:
    import torch

    folder = run_folder / "checkpoint-40"
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2), "evil": Evil()}, folder / "adapter_model.bin")
    failed(ckpt("register", str(folder)), 6, "a pickle with code in it", "system", "nothing was run")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    failed(ckpt("register", str(folder)), 6, "pickle")
    assert not (tmp_path / "pwned").exists()


def test_wrong_base_lists_every_mismatch(ckpt: Ckpt, run_folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "tiny-llama", other)
    weights = load_file(other / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        weights[name] = torch.zeros(8, 8, dtype=torch.bfloat16)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    result = ckpt("register", str(run_folder), "--base", "other")
    failed(result, 4, "does not go with other", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "[8, 8]")
    assert result.err.count("shape_mismatch") == 2
    assert ckpt("list", "--json").json == []


def test_other_weights_of_the_same_shape_are_refused(registered: Ckpt, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "tiny-llama", other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + torch.tensor(1.0, dtype=torch.bfloat16)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    result = registered("check", "support-bot", "--base", "other")
    assert result.code == 4
    assert "base_weights" in result.out
    assert registered("check", "support-bot", "--base", "tiny-llama").code == 0
    shutil.copy(other / "model.safetensors", tmp_path / "tiny-llama" / "model.safetensors")
    failed(registered("merge", "support-bot", "--out", "merged"), 4, "base_changed", "base verify tiny-llama")
    assert not (tmp_path / "merged").exists()
    verified = registered("base", "verify", "tiny-llama")
    assert (verified.code, "lm_head.weight" in verified.out) == (7, True)


def test_what_fits_but_cannot_be_merged_is_said_so(ckpt: Ckpt, run_folder: Path) -> None:
    config = run_folder / "checkpoint-40" / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"alora_invocation_tokens": [1, 2]}
    config.write_text(json.dumps(fields))
    result = ckpt("register", str(run_folder / "checkpoint-40"))
    assert result.code == 0
    assert "cannot merge it: alora_invocation_tokens" in result.err
    failed(ckpt("merge", "support-bot"), 4, "cannot be merged into tiny-llama", "method_not_mergeable")
    assert ckpt("show", "support-bot", "--json").json["compatibility"]["verdict"] == "refused"


def test_names_and_numbers(registered: Ckpt) -> None:
    failed(registered("show", "support-bott"), 3, "did you mean support-bot?")
    failed(registered("show", "support-bot@v99"), 3, "no checkpoint")
    failed(registered("show", "a/b/c"), 2, "is not a reference")
    failed(registered("show", "support-bot@zork:1"), 2, "unknown selector")
    failed(registered("list", "nobody"), 3, "no adapter")
    failed(registered("list", "--best", "zork"), 3, "no candidate has a finite metric 'zork'")
    failed(registered("list", "--sort", "zork"), 2, "sort")
    failed(registered("list", "--best", "--per", "zork"), 2, "adapter, run or base")
    failed(registered("list", "--per", "run"), 2, "only with --best")
    failed(registered("list", "--best", "--min", "--max"), 2, "only one of them")
    failed(registered("list", "--where", "metric.eval_loss << 1"), 2, "^", "for example")
    failed(registered("metric", "add", "support-bot", "bleu=high"), 2, "expected a number")
    failed(registered("metric", "add", "support-bot", "bleu"), 2, "expected name=value")
    failed(registered("merge", "support-bot", "--dtype", "int8"), 2, "dtype", "expected float32")
    failed(registered("alias", "set", "support-bot", "v3"), 2, "reads as a version")
    failed(registered("alias", "rm", "support-bot@nope"), 3, "no checkpoint")
    failed(registered("shipped", "nowhere"), 3, "nothing was ever shipped to 'nowhere'")
    failed(registered("shipped", "--at", "the day after"), 2, "expected a date")
    failed(registered("rollback", "production"), 3, "nothing was ever shipped")
    failed(registered("gc", "--grace", "soon"), 2, "24h")
    failed(registered("base", "show", "zork"), 3, "'zork' was not found")
    failed(registered("register", "support-bot", "--step", "3"), 2, "6 checkpoints")


def test_unknown_direction_is_asked_for(registered: Ckpt) -> None:
    registered("metric", "add", "support-bot@v1", "zorkness=1")
    failed(registered("list", "--best", "zorkness"), 2, "is a lower or a higher zorkness better?", "--min or --max")
    assert registered("list", "--best", "zorkness", "--max").code == 0


def test_ambiguous_digest_lists_the_matches(registered: Ckpt, run_folder: Path) -> None:
    registered("register", str(run_folder / "checkpoint-40"), "--adapter", "copy")
    digest = registered("show", "copy", "--json").json["digest"][7:]
    failed(registered("show", digest[:8]), 3, "could mean any of", "copy@v1", "support-bot@v1", "write more of it")


def test_in_use_says_by_what(registered: Ckpt) -> None:
    registered("ship", "support-bot@v2", "--to", "production")
    registered("alias", "set", "support-bot@v2", "candidate")
    failed(registered("rm", "support-bot@v2", "--yes"), 5, "alias candidate", "shipment 1 to production")


def test_out_that_is_taken(registered: Ckpt, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("mine")
    failed(registered("merge", "support-bot", "--out", "taken"), 5, "something is there already", "another folder")
    failed(registered("pull", "support-bot", "taken"), 5, "something is there already")
    assert (tmp_path / "taken" / "precious").read_text() == "mine"


def test_damaged_store(registered: Ckpt, tmp_path: Path) -> None:
    manifest = registered("show", "support-bot@v1", "--json").json["manifest"]
    digest = next(f["digest"][7:] for f in manifest["files"] if f["path"] == "adapter_model.safetensors")
    blob = tmp_path / "home" / "store" / "blobs" / digest[:2] / digest
    blob.chmod(stat.S_IRUSR | stat.S_IWUSR)
    blob.write_bytes(blob.read_bytes()[:-8] + b"\0" * 7 + b"\1")
    failed(registered("pull", "support-bot@v1", "out"), 7, "not what was recorded")
    assert not (tmp_path / "out").exists()
    blob.unlink()
    failed(registered("check", "support-bot@v1"), 7, "missing in the store", "register the checkpoint again")


def test_base_that_is_gone(registered: Ckpt, tmp_path: Path) -> None:
    shutil.move(tmp_path / "tiny-llama", tmp_path / "elsewhere")
    failed(registered("merge", "support-bot", "--out", "merged"), 3, "tiny-llama: no such file or folder", "base add")
    assert "known already as tiny-llama" in registered("base", "add", "elsewhere").out
    assert registered("merge", "support-bot", "--out", "merged").code == 0


def test_settings_that_cannot_be_used(ckpt: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text("colour = 'red'")
    failed(ckpt("list"), 2, "colour", "database_url, store, user")
    (tmp_path / "home" / "config.toml").write_text("= broken")
    failed(ckpt("list"), 2, "config.toml")
    (tmp_path / "home" / "config.toml").unlink()
    (tmp_path / "home" / "ckpt.db").write_text("this is no database, it only looks like a file " * 50)
    failed(ckpt("list"), 6, "ckpt.db")
    monkeypatch.setenv("CKPT_HOME", str(tmp_path / "home" / "ckpt.db"))
    failed(ckpt("list"), 8, "ckpt.db")


def _child(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CKPT_HOME": str(tmp_path / "home")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_full_disk(registered: Ckpt, tmp_path: Path) -> None:
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    ran = _child(tmp_path, f"{limit} from cli.app import main; main(['merge', 'support-bot', '--out', 'merged'])")
    assert ran.returncode == 8, ran.stderr
    assert "file too large" in ran.stderr
    assert "free some room" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "merged").exists()
    assert registered("merge", "support-bot", "--out", "merged").code == 0


def test_read_only_store(registered: Ckpt, run_folder: Path, tmp_path: Path) -> None:
    """As a user whom permissions bind: root becomes nobody in the child, after importing what nobody may not read."""
    shutil.copytree(tmp_path / "home", tmp_path / "shared")
    for folder in (tmp_path / "shared").rglob("*"):
        folder.chmod(0o666 if folder.is_file() else 0o777)
    for folder in (tmp_path / "shared" / "store", *(tmp_path / "shared" / "store").rglob("*")):
        folder.chmod(0o444 if folder.is_file() else 0o555)
    (run_folder / "checkpoint-40" / "new.txt").write_text("new")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for folder in (tmp_path / "shared", run_folder, tmp_path / "tiny-llama"):
            shutil.copytree(folder, place / folder.name)
        for folder in (place, place / "shared"):
            folder.chmod(0o777)
        code = (
            "import contextlib, os; from cli.app import main; job = ['register', 'support-bot/checkpoint-40']\n"
            "with contextlib.suppress(SystemExit): main(job)\n"  # root imports what nobody may not read
            "os.getuid() == 0 and os.setuid(65534); os.environ['CKPT_HOME'] = 'shared'; main(job)"
        )
        ran = _child(place, code)
        assert ran.returncode == 8, ran.stderr
        assert "permission denied" in ran.stderr
        assert "fix the permissions" in ran.stderr
        assert "Traceback" not in ran.stderr
        for folder in (place / "shared" / "store").rglob("*"):
            folder.chmod(0o755)


def _leaves(kind: type[RegistryError]) -> list[type[RegistryError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in _leaves(child))]


@pytest.mark.parametrize("kind", _leaves(RegistryError)[1:])
def test_every_error_has_its_words(kind: type[RegistryError]) -> None:
    from factories import checkpoint

    from registry.manifest import Report

    names = kind.__init__.__code__.co_varnames[1 : kind.__init__.__code__.co_argcount]
    values = {"position": 0, "near": (), "matches": ("a", "b"), "largest_delta": 0.5,
              "report": Report(checkpoint=checkpoint().ref, base="b", findings=())}  # fmt: skip
    error = kind(**{name: values.get(name, "it") for name in names})  # type: ignore[arg-type]
    explanation = explain(error)
    assert explanation.exit_code in EXIT_CODES
    assert explanation.exit_code > 1
    assert explanation.message
    assert not explanation.message.startswith(kind.__name__)


def test_traceback_on_request(ckpt: Ckpt) -> None:
    assert "Traceback" not in ckpt("show", "nobody").err
    with pytest.raises(registry.errors.UnknownAdapter):
        main(["--traceback", "show", "nobody"])


def test_a_worker_that_cannot_begin_leaves_no_log_behind(ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # those of the tests themselves stay
    before = list(logging.getLogger().handlers), logging.getLogger("ckpt").level
    failed(ckpt("worker"), 2, "PostgreSQL")
    assert (logging.getLogger().handlers, logging.getLogger("ckpt").level) == before


def _large_base(folder: Path) -> None:
    """A base model that takes some pieces to copy, and no room: all but a hole."""
    specs = [
        TensorSpec("model.layers.0.self_attn.q_proj.weight", DType.F32, (64, 64)),
        TensorSpec("model.embed_tokens.weight", DType.BF16, (10_000, 2048)),
    ]
    head, placed = layout_safetensors(specs, {"format": "pt"}, "model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(placed[-1].offset_bytes + specs[-1].size_bytes)


def test_an_interrupted_merge_says_so_and_can_be_done_again(ckpt: Ckpt, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    _large_base(tmp_path / "large")
    (tmp_path / "bot").mkdir()
    factors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": s
        for x, s in (("A", (2, 64)), ("B", (64, 2)))
    }
    save_file(
        {name: np.ones(shape, np.float32) for name, shape in factors.items()},
        tmp_path / "bot" / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "large",
    }
    (tmp_path / "bot" / "adapter_config.json").write_text(json.dumps(config))
    assert ckpt("register", "bot").code == 0
    ran = _child(tmp_path, f"{INTERRUPTED}; from cli.app import main; main(['merge', 'bot', '--out', 'merged'])")
    assert (ran.returncode, ran.stderr) == (130, "interrupted; what is finished is kept, run it again to go on\n")
    assert (tmp_path / "merged.partial").exists()
    assert not (tmp_path / "merged").exists()
    assert ckpt("merge", "bot", "--out", "merged").code == 0


# Interrupts itself when it begins to write. Who starts the tests in the background has interrupts ignored, and children inherit that.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def see(event, arguments, left=[signal.SIGINT]):
    if event == "open" and str(arguments[0]).endswith("merged.partial/model.safetensors") and left:
        os.kill(os.getpid(), left.pop())
sys.addaudithook(see)"""


def test_a_store_of_an_unknown_kind(registered: Ckpt) -> None:
    failed(registered("merge", "support-bot", "--out", "zork://bucket/model"), 8, "zork")


def test_output_that_is_cut_off_is_no_error(registered: Ckpt, tmp_path: Path) -> None:
    command = f"{sys.executable} -m cli list --json | head -1"
    ran = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "CKPT_HOME": str(tmp_path / "home")}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == ("[\n", "")


def test_json_is_json_even_with_nan(registered: Ckpt) -> None:
    registered("metric", "add", "support-bot@v6", "eval_loss=nan")
    found = json.loads(registered("list", "--json").out, parse_constant=pytest.fail)
    assert found[5]["metrics"][-1]["value"] is None
    best = registered("list", "--best", "--json")
    assert best.json[0]["ref"] == "support-bot@v4"
    assert "1 of 6 left out: no finite eval_loss" in best.err
