"""Identity of a base model: the same for the same weights, another for anything else, and never from a stale cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import tiny
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from registry.errors import CorruptFile
from registry.fingerprint import DigestCache, architecture_digest, digest_tensors, tensor_hasher, weights_digest
from registry.formats.adapter import read_tensors
from registry.formats.base_model import read_base
from registry.locations import LocalLocation, Location
from registry.manifest import BaseFormat
from registry.refs import Digest
from registry.tensors import DType, StoredTensor, TensorSpec

NO_CACHE = DigestCache(Path(os.devnull))


@dataclass
class Counting:
    """A location that counts the bytes read; `meddle` is called with the count after each reading."""

    inner: Location
    read_bytes: int = 0
    meddle: Any = field(default=lambda read_bytes: None)

    @property
    def url(self) -> str:
        return self.inner.url

    def files(self) -> Mapping[str, int]:
        return self.inner.files()

    def identity(self, path: str) -> str:
        return self.inner.identity(path)

    def open(self, path: str) -> IO[bytes]:
        return self.inner.open(path)

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        self.inner.read_into(path, offset_bytes, buffer)
        self.read_bytes += len(buffer)
        self.meddle(self.read_bytes)

    def local_path(self, path: str) -> Path | None:
        return self.inner.local_path(path)

    def close(self) -> None:
        self.inner.close()


def tensors_of(location: Location) -> list[StoredTensor]:
    weights = [path for path in location.files() if path.endswith((".safetensors", ".pth"))]
    return [tensor for path in weights for tensor in read_tensors(location, path)]


def digests(folder: Path, **options: Any) -> dict[str, Digest]:
    with LocalLocation(folder) as location:
        return digest_tensors(location, tensors_of(location), cache=NO_CACHE, **options)


STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5), "c": torch.tensor(3, dtype=torch.int64)}


def written(folder: Path, *files: Mapping[str, Tensor]) -> Path:
    folder.mkdir()
    for number, state in enumerate(files):
        save_file(dict(state), folder / f"part-{number}.safetensors")
    return folder


def root(folder: Path) -> Digest:
    return weights_digest(digests(folder))


def test_sharding_names_of_files_and_order_do_not_matter(tmp_path: Path) -> None:
    one = written(tmp_path / "one", STATE)
    parts = [{name: tensor} for name, tensor in reversed(STATE.items())]
    many = written(tmp_path / "many", *parts)
    (many / "part-0.safetensors").rename(many / "renamed.safetensors")
    assert root(one) == root(many)
    assert weights_digest(dict(reversed(digests(one).items()))) == root(one)


CHANGED = {
    "a bit": {**STATE, "b": torch.tensor([1, 1, 1, 1, np.nextafter(np.float32(1), np.float32(2))])},
    "the sign of a zero": {**STATE, "a.weight": STATE["a.weight"] * torch.tensor([-1.0, 1, 1, 1])},
    "the dtype": {**STATE, "b": torch.ones(5).view(torch.int32)},
    "the shape": {**STATE, "a.weight": STATE["a.weight"].reshape(4, 3)},
    "a scalar's shape": {**STATE, "c": STATE["c"].reshape(1)},
    "a name": {name.replace("b", "d"): tensor for name, tensor in STATE.items()},
    "names swapped": {**STATE, "b": STATE["c"], "c": STATE["b"]},
    "one more": {**STATE, "d": torch.empty(0)},
    "one less": {name: tensor for name, tensor in STATE.items() if name != "c"},
}


@pytest.mark.parametrize("change", CHANGED)
def test_everything_else_does(tmp_path: Path, change: str) -> None:
    assert root(written(tmp_path / "one", STATE)) != root(written(tmp_path / "other", CHANGED[change]))


def test_of_a_tensor_dtype_shape_and_bytes_are_hashed(tmp_path: Path) -> None:
    found = digests(written(tmp_path / "one", STATE))
    raw = STATE["a.weight"].numpy().tobytes()
    assert found["a.weight"].hex == blake3(b"F32:3,4\n" + raw).hexdigest()
    assert found["c"].hex == blake3(b"I64:\n" + (3).to_bytes(8, "little")).hexdigest()
    lines = "".join(f"{name} {found[name].hex}\n" for name in ("a.weight", "b", "c"))
    assert weights_digest(found).hex == blake3(lines.encode()).hexdigest()
    assert tensor_hasher(TensorSpec("x", DType.F32, (0,))).hexdigest() == blake3(b"F32:0\n").hexdigest()


def test_both_formats_of_the_same_tensors(tmp_path: Path) -> None:
    archive = tmp_path / "litgpt"
    archive.mkdir()
    torch.save(STATE, archive / "lit_model.pth")
    assert digests(archive) == digests(written(tmp_path / "one", STATE))


def test_threads_and_blocks_do_not_matter(tmp_path: Path) -> None:
    big = {**STATE, "big": torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))}
    folder = written(tmp_path / "big", big)
    done: list[int] = []
    found = digests(folder, threads=1, advance=done.append)
    assert found == digests(folder, threads=5)
    assert found["big"].hex == blake3(b"F32:1000003\n" + big["big"].numpy().tobytes()).hexdigest()
    assert sum(done) == sum(tensor.numel() * tensor.element_size() for tensor in big.values())


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", STATE)
    with LocalLocation(folder) as location:
        tensors = tensors_of(location)
        os.truncate(folder / "part-0.safetensors", (folder / "part-0.safetensors").stat().st_size - 1)
        with pytest.raises(CorruptFile):
            digest_tensors(location, tensors, cache=NO_CACHE)


# ---- the cache


def test_nothing_is_read_twice(tmp_path: Path) -> None:
    location = Counting(LocalLocation(written(tmp_path / "one", STATE, {"d": torch.ones(9)})))
    cache, tensors, done = DigestCache(tmp_path / "cache"), tensors_of(location), list[int]()
    size_bytes = sum(tensor.spec.size_bytes for tensor in tensors)
    found = digest_tensors(location, tensors, cache=cache)
    assert location.read_bytes == size_bytes
    assert digest_tensors(location, tensors, cache=cache, advance=done.append) == found
    assert (location.read_bytes, sum(done)) == (size_bytes, size_bytes)
    save_file({"d": torch.zeros(9)}, tmp_path / "one" / "part-1.safetensors")
    location.inner.close()
    changed = digest_tensors(location, tensors, cache=cache)
    assert location.read_bytes == size_bytes + 36  # of the other file alone
    assert {name for name in found if found[name] != changed[name]} == {"d"}


def test_a_file_is_known_in_its_own_place_only(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "cache")
    cache.put("/model", "a.safetensors", "1:2:3", {"w": Digest("0" * 64)})
    assert cache.get("/model", "a.safetensors", "1:2:3") == {"w": Digest("0" * 64)}
    for other in (
        ("/elsewhere", "a.safetensors", "1:2:3"),
        ("/model", "b", "1:2:3"),
        ("/model", "a.safetensors", "1:2:4"),
    ):
        assert cache.get(*other) is None


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"w": 5}', '{"w": "abc"}'])
def test_a_broken_cache_is_no_cache(tmp_path: Path, text: str) -> None:
    cache = DigestCache(tmp_path)
    cache.put("/model", "a", "1", {"w": Digest("0" * 64)})
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert cache.get("/model", "a", "1") is None


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", STATE)
    location = Counting(
        LocalLocation(folder), meddle=lambda read_bytes: os.utime(folder / "part-0.safetensors", (1, 1))
    )
    cache, tensors = DigestCache(tmp_path / "cache"), tensors_of(location)
    digest_tensors(location, tensors, cache=cache)
    once = location.read_bytes
    digest_tensors(location, tensors, cache=cache)
    assert location.read_bytes == 2 * once


def test_a_cache_that_lacks_a_tensor_is_not_enough(tmp_path: Path) -> None:
    location = Counting(LocalLocation(written(tmp_path / "one", STATE)))
    cache, tensors = DigestCache(tmp_path / "cache"), tensors_of(location)
    digest_tensors(location, tensors[:1], cache=cache)
    assert digest_tensors(location, tensors, cache=cache) == digests(tmp_path / "one")


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with LocalLocation(written(tmp_path / "one", STATE)) as location:
        tensors = tensors_of(location)
        found = digest_tensors(location, tensors, cache=DigestCache(tmp_path / "file"))
    assert found == digests(tmp_path / "one")


# ---- architecture

SPECS = [TensorSpec("w", DType.F32, (2, 3)), TensorSpec("v", DType.BF16, (3,))]
CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_size": 3, "num_hidden_layers": 2}


def architecture(config: Mapping[str, Any], specs: list[TensorSpec] = SPECS) -> Digest:
    return architecture_digest(BaseFormat.SAFETENSORS, config, specs)


def test_what_an_architecture_is() -> None:
    same = [
        architecture(CONFIG, SPECS[::-1]),
        architecture({**CONFIG, "transformers_version": "5.0", "use_cache": False, "head_dim": None}),
    ]
    other = [
        architecture({**CONFIG, "hidden_size": 4}),
        architecture({**CONFIG, "text_config": {"num_attention_heads": 2}}),
        architecture(CONFIG, SPECS[:1]),
        *(architecture(CONFIG, [SPECS[0], spec]) for spec in (
            TensorSpec("u", DType.BF16, (3,)), TensorSpec("v", DType.F16, (3,)), TensorSpec("v", DType.BF16, (3, 1)),
        )),
        architecture_digest(BaseFormat.LITGPT, CONFIG, SPECS),
    ]  # fmt: skip
    assert set(same) == {architecture(CONFIG)}
    assert len({architecture(CONFIG), *other}) == 1 + len(other)


def test_an_architecture_is_known_from_headers_alone(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        head = read_base(LocalLocation(tiny.write_base(tmp_path / str(seed), seed=seed, shards=seed + 1)))
        found.append(architecture_digest(head.format, head.config, [tensor.spec for tensor in head.tensors]))
    assert found[0] == found[1]


@given(st.dictionaries(st.text("abc.", min_size=1), st.integers(0, 1 << 64), max_size=5), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_root_names_a_set_of_tensors(numbers: dict[str, int], random: Any) -> None:
    tensors = {name: Digest(f"{number:064x}") for name, number in numbers.items()}
    shuffled = list(tensors.items())
    random.shuffle(shuffled)
    assert weights_digest(dict(shuffled)) == weights_digest(tensors)
    for name in tensors:
        assert weights_digest({**tensors, name: Digest("f" * 64)}) != weights_digest(tensors)
