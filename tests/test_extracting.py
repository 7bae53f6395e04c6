"""Extraction of LoRAs and of adapters: how near the factors are, what is refused, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from merging import Bench, read_weights
from safetensors.numpy import save_file

from registry.errors import Conflict, InvalidInput, NotConvertible, UnknownBase
from registry.extracting import Extract, Extraction
from registry.merge.extract import EXACT_SIDE, fit, peak_bytes
from registry.separating import Separate
from registry.tensors import DType

Arrays = tiny.Arrays


# -- how near


def spectrum(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(torch.randn((n, len(values)), generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    ]
    return (sides[0] * values) @ sides[1].T


@pytest.mark.parametrize("shape", [(1100, 1300), (1300, 1100)])
def test_large_matrices_are_fitted_as_well_as_small_ones(shape: tuple[int, int]) -> None:
    """The range finder comes within a thousandth of the best there is, where values fall slowly, with a tail of full length."""
    assert min(shape) > EXACT_SIDE
    values = torch.arange(1, 301, dtype=torch.float64) ** -0.5
    delta = spectrum(*shape, values).float()
    size = float(delta.double().norm())
    found = fit(delta, size, 12, "model.layers.0.mlp.up_proj.weight", DType.F32)
    optimum = float(values[12:].square().sum().sqrt())
    assert optimum * (1 - 1e-6) <= found.residual <= optimum * 1.001


def test_large_matrices_of_low_rank_come_back() -> None:
    delta = spectrum(1100, 1200, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).float()
    found = fit(delta, float(delta.norm()), 3, "w", DType.F32)
    assert found.residual < 1e-6 * found.size


def test_the_same_matrix_gives_the_same_factors() -> None:
    delta = spectrum(1100, 1030, torch.linspace(2, 1, 40, dtype=torch.float64)).float()
    first, again, other = (fit(delta, 1.0, 4, name, DType.BF16) for name in ("a", "a", "b"))
    assert (first.left, first.right) == (again.left, again.right)
    assert other.residual == pytest.approx(first.residual, rel=1e-2)


def test_signs_do_not_depend_on_the_decomposition() -> None:
    delta = spectrum(20, 30, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    found = fit(delta, 1.0, 3, "w", DType.F64)
    left = torch.frombuffer(bytearray(found.left), dtype=torch.float64).view(20, 3)
    assert bool((left.gather(0, left.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_a_rank_beyond_the_matrix_is_filled_with_zeros() -> None:
    delta = torch.randn((3, 5), dtype=torch.float64)
    found = fit(delta, float(delta.norm()), 8, "w", DType.F64)
    left, right = (torch.frombuffer(bytearray(data), dtype=torch.float64) for data in (found.left, found.right))
    assert torch.allclose(left.view(3, 8) @ right.view(8, 5), delta)
    assert not left.view(3, 8)[:, 3:].any()


def test_memory_grows_with_the_matrices_in_work_and_not_with_their_squares() -> None:
    whole = 4 * 8192 * 28672
    one, two = (peak_bytes((8192, 28672), 64, matrices) for matrices in (1, 2))
    assert 2 * whole < one < 3 * whole
    assert 2 * whole < two - one < one


# -- models


def write_tuned(
    folder: Path, change: Arrays, *, base: Arrays | None = None, config: dict[str, Any] | None = None
) -> Path:
    """The base model with some tensors changed by so much."""
    folder.mkdir()
    tensors = {name: array + change.get(name, 0) for name, array in (base or tiny.base_tensors()).items()}
    save_file(
        {name: array.astype(np.float32) for name, array in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    tiny.write_json(folder / "config.json", {**tiny.CONFIG, **(config or {})})
    return folder


Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
CHANGE: Arrays = {
    Q: np.outer(np.arange(tiny.WIDTH), np.ones(tiny.WIDTH)).astype(np.float32),
    NORM: np.ones(tiny.WIDTH, np.float32),
}


def extract(bench: Bench, base: Path, tuned: str | Path, **options: Any) -> Extraction:
    return bench.registry.extract(str(base), str(tuned), Extract(**{"rank": 1, **options}))


def test_what_did_not_change_is_not_touched(tmp_path: Path, bench: Bench, base: Path) -> None:
    tuned = write_tuned(tmp_path / "tuned", CHANGE)
    found = extract(bench, base, tuned, out=tmp_path / "out")
    assert [(each.name, each.kind) for each in found.tensors] == [(Q, "factors"), (NORM, "whole")]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert config["modules_to_save"] == ["model.norm"]
    bench.merge(tmp_path / "out", base, tmp_path / "merged")
    merged, expected = read_weights(tmp_path / "merged"), read_weights(tuned)
    assert all(torch.allclose(merged[name], expected[name], rtol=0, atol=1e-5) for name in expected)


def test_it_is_registered_with_its_residual_and_where_it_is_from(tmp_path: Path, bench: Bench, base: Path) -> None:
    tuned = write_tuned(
        tmp_path / "tuned", {**CHANGE, "lm_head.weight": np.full((tiny.VOCABULARY, tiny.WIDTH), 0.5, np.float32)}
    )
    found = extract(bench, base, tuned, name="team/tuned", rank=2)
    assert found.registered is not None
    made = found.registered.checkpoint
    assert (made.ref, made.manifest.rank, made.base_name) == ("team/tuned@v1", 2, "base")
    assert made.metric("extraction_residual") == pytest.approx(found.residual)
    assert made.origin is not None
    assert made.origin.detail["not_covered"] == ["lm_head.weight"]
    assert made.origin.detail["from"]["url"] == str(tuned)
    assert [base.name for base in bench.registry.bases()] == ["base"]
    assert list((bench.registry.settings.home / "making").iterdir()) == []


def test_a_merged_model_in_the_store_can_be_extracted_from(
    tmp_path: Path, bench: Bench, base: Path, adapter: Path
) -> None:
    merged = bench.registry.merge(bench.plan(adapter, base)).merged
    found = extract(bench, base, merged.digest.hex, rank=4, out=tmp_path / "out")
    assert found.residual < 1e-5
    assert json.loads((tmp_path / "out/extraction.json").read_text())["from"]["merged"] == str(merged.digest)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"extra.weight": np.ones((2, 2), np.float32)}, "extra.weight: only in the fine-tuned model"),
        (
            {"lm_head.weight": np.ones((tiny.VOCABULARY + 1, tiny.WIDTH), np.float32)},
            "lm_head.weight: [33, 16] instead of [32, 16]",
        ),
        ({NORM: None}, "model.norm.weight: only in the base"),
        ({Q: np.full((tiny.WIDTH, tiny.WIDTH), np.nan, np.float32)}, f"{Q}: NaN or infinity"),
    ],
)
def test_models_that_are_not_the_same_are_refused(
    tmp_path: Path, bench: Bench, base: Path, tensors: dict[str, Any], reason: str
) -> None:
    kept = {name: array for name, array in {**tiny.base_tensors(), **tensors}.items() if array is not None}
    tuned = write_tuned(tmp_path / "tuned", {}, base=kept)
    with pytest.raises(NotConvertible) as refusal:
        extract(bench, base, tuned, out=tmp_path / "out")
    assert refusal.value.reasons[0].startswith(reason)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "registry", "tuned"]


def test_nothing_to_extract_is_an_error(tmp_path: Path, bench: Bench, base: Path) -> None:
    tuned = write_tuned(tmp_path / "tuned", {})
    with pytest.raises(NotConvertible, match="not one value differs"):
        extract(bench, base, tuned, out=tmp_path / "out")
    norms = write_tuned(tmp_path / "norms", {NORM: CHANGE[NORM]})
    with pytest.raises(NotConvertible, match=f"{NORM}: no matrix"):
        extract(bench, base, norms, out=tmp_path / "out", saved=())
    assert not (tmp_path / "out").exists()


def test_a_wider_copy_of_the_same_values_did_not_change(tmp_path: Path, bench: Bench) -> None:
    """Saved again in another dtype, digests differ and values do not."""
    half = {name: array.astype(np.float16) for name, array in tiny.base_tensors().items()}
    (tmp_path / "half").mkdir()
    save_file(half, tmp_path / "half/model.safetensors", {"format": "pt"})
    tiny.write_json(tmp_path / "half/config.json", tiny.CONFIG)
    tuned = write_tuned(
        tmp_path / "tuned", {Q: CHANGE[Q]}, base={name: array.astype(np.float32) for name, array in half.items()}
    )
    found = extract(bench, tmp_path / "half", tuned, out=tmp_path / "out")
    assert [each.name for each in found.tensors] == [Q]
    assert found.residual < 1e-6


@pytest.mark.parametrize(
    ("options", "field"),
    [({"rank": 0, "name": "x"}, "rank"), ({}, "--out"), ({"name": "x", "dtype": DType.I8}, "dtype"),
     ({"name": "x", "modules": ("query",)}, "--modules"), ({"name": "x", "saved": ("nor",)}, "--save")],
)  # fmt: skip
def test_options_that_make_no_sense(
    tmp_path: Path, bench: Bench, base: Path, options: dict[str, Any], field: str
) -> None:
    tuned = write_tuned(tmp_path / "tuned", CHANGE)
    with pytest.raises(InvalidInput) as refusal:
        extract(bench, base, tuned, **options)
    assert refusal.value.field == field


def test_the_places_must_be_right(tmp_path: Path, bench: Bench, base: Path) -> None:
    with pytest.raises(UnknownBase):
        extract(bench, base, tmp_path / "nowhere", out=tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(Conflict):
        extract(bench, base, write_tuned(tmp_path / "tuned", CHANGE), out=tmp_path / "out")
    litgpt = tiny.write_litgpt_base(tmp_path / "litgpt")
    with pytest.raises(NotConvertible, match="must be in transformers' layout"):
        extract(bench, litgpt, litgpt, name="x")


# -- out of files that hold more


def write_state(file: Path, *, named: bool = True, extra: Arrays | None = None) -> Path:
    """The state of a wrapped model: the base's tensors and the adapter's."""
    base = {f"base_model.model.{name}": array for name, array in tiny.base_tensors().items()}
    inside = ".default.weight" if named else ".weight"
    own = {name.removesuffix(".weight") + inside: array for name, array in tiny.adapter_tensors().items()}
    save_file({**base, **own, **(extra or {})}, file)
    return file


def separate(bench: Bench, file: Path, adapter: Path, **options: Any) -> Any:
    return bench.registry.separate(Separate(files=(file,), config=adapter / "adapter_config.json", **options))


@pytest.mark.parametrize("named", [True, False])
def test_only_the_adapters_tensors_are_taken(tmp_path: Path, bench: Bench, adapter: Path, named: bool) -> None:
    state = write_state(tmp_path / "state.safetensors", named=named)
    found = separate(bench, state, adapter, out=tmp_path / "out")
    assert (found.tensors, found.left) == (8, len(tiny.base_tensors()))
    taken, expected = (read_weights(place) for place in (tmp_path / "out", adapter))
    assert taken.keys() == expected.keys()
    assert all(torch.equal(taken[name], expected[name]) for name in expected)


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path, bench: Bench, adapter: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    state = write_state(tmp_path / "state.safetensors", extra={f"module.{name}": np.ones((4, tiny.WIDTH), np.float32)})
    with pytest.raises(NotConvertible, match=r"are both base_model"):
        separate(bench, state, adapter, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_without_an_adapter_is_refused(tmp_path: Path, bench: Bench, base: Path, adapter: Path) -> None:
    with pytest.raises(NotConvertible, match="no tensors of an adapter 'default'"):
        separate(bench, base / "model.safetensors", adapter, out=tmp_path / "out")


def test_where_it_goes_must_be_said(tmp_path: Path, bench: Bench, adapter: Path) -> None:
    with pytest.raises(InvalidInput, match="say where to"):
        separate(bench, write_state(tmp_path / "state.safetensors"), adapter)
    with pytest.raises(InvalidInput, match="name the file"):
        bench.registry.separate(Separate(files=(), config=adapter / "adapter_config.json", name="x"))
