"""vLLM's resolver, against a stand-in of the interface that vLLM publishes (`data/vllm_interface`)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny

from registry.local_copies import sweep_copies, used_copy
from registry.registering import Registration
from registry.service import Registry

HERE = Path(__file__).parent


def _forget() -> None:
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "vllm" or name == "registry.integrations.vllm"
    ]:
        del sys.modules[name]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, ckpt: Registry, base: Path) -> Iterator[Any]:
    """vLLM's server of the base model, with the plugin loaded by its entry point, on the registry of the environment."""
    monkeypatch.syspath_prepend(str(HERE / "data" / "vllm_interface"))
    monkeypatch.setenv("CKPT_HOME", str(ckpt.settings.home))
    _forget()
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["ckpt"].partition(":")
    getattr(import_module(module), function)()
    yield import_module("vllm.serving").Models(str(base))
    _forget()


def ask(served: Any, name: str) -> Any:
    return asyncio.run(served.resolve_lora(name))


def register(ckpt: Registry, folder: Path, name: str = "support-bot") -> None:
    ckpt.register(str(folder), Registration(adapter=name))


def versions(ckpt: Registry, tmp_path: Path, base: Path) -> None:
    for seed in (1, 2):
        register(ckpt, tiny.write_adapter(tmp_path / f"v{seed}", base=base, seed=seed))


def test_a_version_is_a_copy_of_its_own(served: Any, ckpt: Registry, tmp_path: Path, base: Path) -> None:
    versions(ckpt, tmp_path, base)
    first, second = ask(served, "support-bot@v1"), ask(served, "support-bot@v2")
    assert (first.lora_name, second.lora_name) == ("support-bot@v1", "support-bot@v2")
    assert tiny.contents(Path(first.lora_path)) == tiny.contents(tmp_path / "v1")
    assert tiny.contents(Path(second.lora_path)) == tiny.contents(tmp_path / "v2")
    assert Path(first.lora_path) == ckpt.settings.home / "serving" / ckpt.resolve("support-bot@v1").digest.hex


def test_a_moving_name_is_pinned_and_says_so(
    served: Any, ckpt: Registry, tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    versions(ckpt, tmp_path, base)
    ckpt.ship(ckpt.resolve("support-bot@v1"), "production")
    assert ask(served, "support-bot@production").lora_name == "support-bot@v1"
    assert "support-bot@production is support-bot@v1 now, and stays so" in caplog.text
    ckpt.ship(ckpt.resolve("support-bot@v2"), "production")
    assert ask(served, "support-bot@production").lora_name == "support-bot@v1"  # vLLM does not ask again
    served.unload("support-bot@production")
    after = ask(served, "support-bot@production")
    assert after.lora_name == "support-bot@v2"
    assert after.lora_path.endswith(ckpt.resolve("support-bot@v2").digest.hex)


def test_a_pinned_name_is_not_talked_about(
    served: Any, ckpt: Registry, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register(ckpt, adapter)
    assert ask(served, "support-bot@v1") is not None
    assert not caplog.records


@pytest.mark.parametrize("name", ["gpt-4o", "support-bot@v9", "not a name", "support-bot@", ""])
def test_what_is_no_checkpoint_is_declined_aloud(
    served: Any, ckpt: Registry, adapter: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    register(ckpt, adapter)
    assert ask(served, name) is None
    assert f"{name} is not served: " in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "why"), [("use_dora", True, "DoRA"), ("modules_to_save", ["lm_head"], "lm_head")]
)
def test_what_vllm_would_refuse_is_declined_with_the_reason(
    served: Any,
    ckpt: Registry,
    tmp_path: Path,
    base: Path,
    field: str,
    value: object,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tiny.write_adapter(tmp_path / "bot", base=base, config={field: value})
    if field == "use_dora":
        add_magnitudes(folder)
    else:
        add_head(folder)
    register(ckpt, folder)
    assert ask(served, "support-bot@v1") is None
    assert why in caplog.text
    assert "support-bot-v1-merged" in caplog.text


def add_magnitudes(folder: Path) -> None:
    _add(folder, {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_magnitude_vector": (tiny.WIDTH,)
        for layer in range(tiny.LAYERS) for name in ("q_proj", "v_proj")
    })  # fmt: skip


def add_head(folder: Path) -> None:
    _add(folder, {"base_model.model.lm_head.weight": (tiny.VOCABULARY, tiny.WIDTH)})


def _add(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    save_file({**load_file(weights), **{name: np.ones(shape, np.float32) for name, shape in shapes.items()}}, weights)


def test_another_base_model_is_declined(
    served: Any, ckpt: Registry, tmp_path: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register(ckpt, adapter)
    other = tiny.write_base(tmp_path / "other", seed=9)
    served.model = str(other)
    assert ask(served, "support-bot@v1") is None
    assert f"{other} is served" in caplog.text


def test_a_base_model_is_known_by_weights_before_names(
    served: Any, ckpt: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The name that the adapter's files give their base is another model's in the registry."""
    own, other = tiny.write_base(tmp_path / "one"), tiny.write_base(tmp_path / "two", seed=9)
    ckpt.add_base(str(own), name="meta/llama")
    ckpt.add_base(str(other), name="meta/llama-2")
    folder = tiny.write_adapter(tmp_path / "bot", base="meta/llama-2")
    ckpt.register(str(folder), Registration(adapter="support-bot", base="meta/llama"))
    served.model = "meta/llama-2"
    assert ask(served, "support-bot@v1") is None
    assert "and meta/llama-2 is" in caplog.text
    for name in ("meta/llama", str(own), f"base-{ckpt.base('meta/llama').digest.short}"):
        served.model = name
        assert ask(served, "support-bot@v1") is not None
        served.unload("support-bot@v1")


def test_a_name_in_the_adapters_files_is_enough_where_the_registry_knows_no_other(
    served: Any, ckpt: Registry, tmp_path: Path, base: Path
) -> None:
    ckpt.add_base(str(base), name="ours")
    folder = tiny.write_adapter(tmp_path / "bot", base="meta/llama")
    ckpt.register(str(folder), Registration(adapter="support-bot", base="ours"))
    served.model = "meta/llama"
    assert ask(served, "support-bot@v1") is not None


def test_a_registry_that_does_not_answer_is_told_of(
    served: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CKPT_SERVER", "http://127.0.0.1:9")
    assert ask(served, "support-bot@v1") is None
    assert "is not served: http://127.0.0.1:9" in caplog.text


def test_what_is_served_is_not_swept_while_it_is(
    served: Any, ckpt: Registry, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads an adapter again that it has dropped from memory."""
    register(ckpt, adapter)
    folder = Path(ask(served, "support-bot@v1").lora_path)
    assert sweep_copies(ckpt.settings.home, unused=timedelta(0)).copies == 0
    served.unload("support-bot@v1")
    assert ask(served, "support-bot@v1").lora_path == str(folder)
    assert tiny.contents(folder) == tiny.contents(adapter)


def test_what_is_declined_is_not_kept(served: Any, ckpt: Registry, tmp_path: Path, base: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "bot", base=base, config={"modules_to_save": ["lm_head"]})
    add_head(folder)
    register(ckpt, folder)
    with used_copy(ckpt, ckpt.resolve("support-bot@v1")):
        pass
    assert ask(served, "support-bot@v1") is None
    assert sweep_copies(ckpt.settings.home, unused=timedelta(0)).copies == 1


def test_a_process_that_ends_lets_go_of_its_copies(served: Any, ckpt: Registry, adapter: Path, base: Path) -> None:
    register(ckpt, adapter)
    program = (
        "import asyncio, sys; from registry.integrations.vllm import CheckpointResolver\n"
        "print(asyncio.run(CheckpointResolver().resolve_lora(sys.argv[1], 'support-bot@v1')).lora_path)"
    )
    places = os.pathsep.join([str(HERE / "data" / "vllm_interface"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, "-c", program, str(base)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert Path(done.stdout.strip()).is_dir()
    assert sweep_copies(ckpt.settings.home, unused=timedelta(0)).copies == 1
