"""Take an adapter out of files that hold it among the weights of its whole model: a wrapped model's state as a trainer saved it.

Which tensors are the adapter's is told by their names, as PEFT and litgpt give them; what a trainer put in front of or between them (`module.`,
`_fsdp_wrapped_module.`, `_orig_mod.`) is taken away. Bytes are copied as they are. What is left out is the base model's, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from registry.base_models import base_of_adapter, find_base
from registry.disk import Translating, appearing, passing
from registry.errors import InvalidInput, NotConvertible, PathNotFound, Refused
from registry.formats import read_adapter, resolve
from registry.formats.adapter import TOKENIZER_FILES, read_json, read_tensors, read_yaml
from registry.formats.litgpt import HYPERPARAMETERS_FILE, MODEL_CONFIG_FILE
from registry.formats.peft import CONFIG_FILE, WEIGHTS_FILES
from registry.locations import Location, open_location
from registry.manifest import BaseModel, Level, Origin, Report
from registry.rearranging import copy_files
from registry.registering import Registered, Registration, register
from registry.tensors import StoredTensor, TensorSpec
from registry.torchzip import layout_torch_zip
from registry.weights_files import write_safetensors, write_torch_zip
from registry.workspace import Progress, Workspace, silent

_WORDS = "an adapter"
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|_forward_module|module)\."
)
_PEFT = "base_model."
_DEFAULT = "default"
# Of tuners whose parameters do not begin with their own name.
_PARAMETERS = {"ADALORA": "lora_", "LOHA": "hada_", "DORA": "lora_"}
# PEFT saves this one module as the bare parameter that it used to be.
_MAGNITUDE = (".lora_magnitude_vector.weight", ".lora_magnitude_vector")
_LITGPT_NAME = re.compile(r"(?:.*\.)?((?:transformer|lm_head)\.[\w.]+)")
_LITGPT_NORMS = re.compile(r"transformer\.(?:h\.\d+\.norm_[12]|ln_f)\.(?:weight|bias)")
_SIDECARS = (
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "generation_config.json",
    "prompt_style.yaml",
    MODEL_CONFIG_FILE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Separate:
    """What to take out.

    `files` hold the weights; `config` is the adapter's configuration (adapter_config.json or hyperparameters.yaml). `adapter_name` is what PEFT
    called the adapter in training; empty for `default`, or the only one there is. `base` names the base model where the configuration does not.
    At least one of `out` (a new folder) and `name` (to register it under) is given.
    """

    files: tuple[Path, ...]
    config: Path
    adapter_name: str = ""
    base: str = ""
    out: Path | None = None
    name: str = ""

    def check(self) -> None:
        """See that it goes anywhere.

        Raises:
            InvalidInput: neither a folder nor a name, or no file.
        """
        if not self.files:
            raise InvalidInput("--from", "", "name the file that holds the weights")
        if self.out is None and not self.name:
            raise InvalidInput("--out", "", "say where to: --out DIR, or --as NAME, or both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """The adapter that was taken out: how many tensors are its own, and how many were left. `others`: further adapters in the same files."""

    place: str
    tensors: int
    left: int
    others: tuple[str, ...]
    registered: Registered | None = None


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor under the name that it has in the adapter's own file, and where it lies."""

    location: Location
    tensor: StoredTensor
    name: str

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.tensor.spec.dtype, self.tensor.spec.shape)

    def read(self) -> bytes:
        data = bytearray(self.tensor.spec.size_bytes)
        self.location.read_into(self.tensor.file, self.tensor.offset_bytes, memoryview(data))
        return bytes(data)


def separate(workspace: Workspace, wanted: Separate, progress: Progress = silent) -> Separation:
    """Take an adapter out of files that hold more.

    Args:
        workspace: where it is registered.
        wanted: what to take, and where to.
        progress: told of the bytes of the base model that are read.

    Raises:
        NotConvertible: no tensors of such an adapter, or several adapters.
        Refused: it does not fit its base model.
        PathNotFound: no such file.
        CorruptFile, UnsafePickle: a file is not what it should be.
        Conflict: something is there already.
    """
    wanted.check()
    with appearing(wanted.out) if wanted.out else passing(workspace.settings.home / "making") as folder:
        found = take_out(wanted, folder)
        registered = _settle(workspace, wanted, folder, progress)
    return replace(found, registered=registered)


def take_out(wanted: Separate, folder: Path) -> Separation:
    """Write the adapter's own files into a folder; nothing is recorded yet.

    Raises:
        NotConvertible, PathNotFound, CorruptFile, UnsafePickle: as `separate`.
    """
    is_litgpt = wanted.config.suffix in (".yaml", ".yml")
    with closing(_folder_of(wanted.config)) as beside:
        config = (read_yaml if is_litgpt else read_json)(beside, wanted.config.name)
        stored = [(place, tensor) for file in wanted.files for place, tensor in _tensors(file)]
        found, others = (
            (_litgpt_tensors(stored), ()) if is_litgpt else _peft_tensors(stored, config, wanted.adapter_name)
        )
        _check_found(found, wanted)
        if is_litgpt:
            _write_litgpt(folder, found, beside, wanted.config.name)
        else:
            _write_peft(folder, found, beside, wanted.config.name)
    return Separation(place=str(wanted.out or ""), tensors=len(found), left=len(stored) - len(found), others=others)


def _folder_of(file: Path) -> Location:
    return open_location(str(file.absolute().parent))


def _tensors(file: Path) -> list[tuple[Location, StoredTensor]]:
    location = _folder_of(file)
    if file.name not in location.files():
        raise PathNotFound(str(file))
    return [(location, tensor) for tensor in read_tensors(location, file.name)]


def _check_found(found: Sequence[_Source], wanted: Separate) -> None:
    label = ", ".join(str(file) for file in wanted.files)
    if not found:
        raise NotConvertible(label, _WORDS, [f"no tensors of an adapter {wanted.adapter_name or _DEFAULT!r} in it"])
    seen: dict[str, str] = {}
    for source in found:
        if source.name in seen:
            raise NotConvertible(
                label, _WORDS, [f"{source.tensor.spec.name} and {seen[source.name]} are both {source.name}"]
            )
        seen[source.name] = source.tensor.spec.name


# -- PEFT


def _peft_tensors(
    stored: Sequence[tuple[Location, StoredTensor]], config: Mapping[str, Any], adapter_name: str
) -> tuple[list[_Source], tuple[str, ...]]:
    """The tensors of one adapter under the names that `save_pretrained` would give them, and the names of the other adapters."""
    prefix = _parameter_prefix(config)
    named = [(place, tensor, _clean(tensor.spec.name)) for place, tensor in stored]
    present = sorted(
        {match[1] for _, _, name in named if (match := re.search(rf"\.{prefix}\w*\.(\w+)(?:\.weight)?$", name))}
        - {"weight", "bias"}
    )
    wanted = adapter_name or (_DEFAULT if _DEFAULT in present or len(present) != 1 else present[0])
    if adapter_name and adapter_name not in present:
        raise NotConvertible(
            "the weights",
            f"{_WORDS} {adapter_name!r}",
            [f"the adapters in them are {', '.join(present) or 'without names'}"],
        )
    if len(present) > 1 and wanted not in present:
        raise NotConvertible(
            "the weights", _WORDS, [f"several are in them: say which with --adapter-name: {', '.join(present)}"]
        )
    found = []
    for place, tensor, name in named:
        own = _own_name(name, wanted, prefix, is_named=bool(present)) or _bias_name(
            name, str(config.get("bias") or "none")
        )
        if own:
            found.append(_Source(place, tensor, own))
    return _without_stray_biases(found, str(config.get("bias") or "none")), tuple(
        each for each in present if each != wanted
    )


def _parameter_prefix(config: Mapping[str, Any]) -> str:
    kind = str(config.get("peft_type") or "")
    return re.escape(_PARAMETERS.get(kind, f"{kind.lower()}_"))


def _clean(name: str) -> str:
    """A key without what trainers put around it, beginning with PEFT's own prefix."""
    bare = _WRAPPERS.sub("", name)
    at = bare.find(f"{_PEFT}model.")
    at = at if at >= 0 else bare.find(_PEFT)
    return bare[at:] if at >= 0 else f"{_PEFT}model.{bare}"


def _own_name(name: str, adapter: str, prefix: str, *, is_named: bool) -> str:
    """The key in the adapter's own file; empty for what is not this adapter's."""
    if match := re.fullmatch(rf"(.+)\.modules_to_save\.{re.escape(adapter)}\.(.+)", name):
        return f"{match[1]}.{match[2]}"
    if is_named:
        # `lora_A.default.weight`, `ia3_l.default`, `token_adapter.trainable_tokens_delta.default`
        match = re.fullmatch(rf"(.+\.(?:{prefix}|trainable_tokens_)\w*)\.{re.escape(adapter)}(\.\w+)?", name)
        return f"{match[1]}{match[2] or ''}".replace(*_MAGNITUDE) if match else ""
    return name if re.fullmatch(rf".+\.{prefix}\w*(?:\.\w+)?", name) else ""


def _bias_name(name: str, bias: str) -> str:
    """Biases that the configuration says were trained, and so belong to the adapter."""
    is_own = (
        bias != "none"
        and name.endswith(".bias")
        and ".modules_to_save." not in name
        and ".original_module." not in name
    )
    return name if is_own else ""


def _without_stray_biases(found: Sequence[_Source], bias: str) -> list[_Source]:
    """With `lora_only`, biases of layers without factors are the base's."""
    if bias != "lora_only":
        return list(found)
    targeted = {source.name.rpartition(".lora_")[0] for source in found if ".lora_" in source.name}
    return [
        source
        for source in found
        if not source.name.endswith(".bias")
        or ".lora_" in source.name
        or source.name.removesuffix(".bias").removesuffix(".base_layer") in targeted
    ]


def _write_peft(folder: Path, found: Sequence[_Source], beside: Location, config: str) -> None:
    write_safetensors(folder / WEIGHTS_FILES[0], [source.spec for source in found], (source.read() for source in found))
    _copy_config(folder, beside, config, CONFIG_FILE)
    _copy_sidecars(folder, beside, config)


# -- litgpt


def _litgpt_tensors(stored: Sequence[tuple[Location, StoredTensor]]) -> list[_Source]:
    """The tensors that litgpt would have saved: of Adapter v2 the norms, too."""
    named = []
    for place, tensor in stored:
        if match := _LITGPT_NAME.fullmatch(_WRAPPERS.sub("", tensor.spec.name)):
            named.append(_Source(place, tensor, match[1]))
    has_scales = any(_is_scale(source.name) for source in named)
    return [
        source
        for source in named
        if _is_litgpt_adapter(source.name) or (has_scales and _LITGPT_NORMS.fullmatch(source.name))
    ]


def _is_scale(name: str) -> bool:
    return name.endswith((".adapter_scale", ".adapter_bias"))


def _is_litgpt_adapter(name: str) -> bool:
    return ".lora_" in name or _is_scale(name) or name.endswith((".gating_factor", ".adapter_wte.weight"))


def _write_litgpt(folder: Path, found: Sequence[_Source], beside: Location, config: str) -> None:
    names = [source.name for source in found]
    kind = (
        "lora" if any(".lora_" in name for name in names) else "adapter_v2" if any(map(_is_scale, names)) else "adapter"
    )
    path = folder / f"lit_model.pth.{kind}"
    by_name = {source.name: source for source in found}
    layout = layout_torch_zip([source.spec for source in found], {}, path.name)
    write_torch_zip(path, layout, lambda name: [by_name[name].read()])
    _copy_config(folder, beside, config, HYPERPARAMETERS_FILE)
    _copy_sidecars(folder, beside, config)


# -- around the weights


def _copy_config(folder: Path, beside: Location, name: str, target: str) -> None:
    with beside.open(name) as stream, Translating(str(folder / target)):
        (folder / target).write_bytes(stream.read())


def _copy_sidecars(folder: Path, beside: Location, config: str) -> None:
    present = beside.files()
    copy_files(beside, [path for path in _SIDECARS if path in present and path != config], folder)


def _settle(workspace: Workspace, wanted: Separate, folder: Path, progress: Progress) -> Registered | None:
    """Check the adapter against its base model, or register it, which does so."""
    base = wanted.base or _base_name(workspace, folder, wanted, progress)
    if wanted.name:
        (registered,) = register(workspace, str(folder), registration(wanted, base), progress=progress).registered
        return registered
    check_fits(wanted, folder, find_base(workspace, base, progress=progress))
    return None


def registration(wanted: Separate, base: str) -> Registration:
    """What is recorded of an adapter that was taken out."""
    files = [str(file) for file in wanted.files]
    origin = Origin(action="extract", detail={"files": files})
    return Registration(adapter=wanted.name, base=base, run="extracted", source=_source(wanted), origin=origin)


def check_fits(wanted: Separate, folder: Path, base: BaseModel) -> None:
    """See that an adapter that was taken out belongs to a base model.

    Raises:
        Refused: it does not.
    """
    findings = resolve(read_adapter(open_location(str(folder))), base).findings
    if any(finding.level is Level.REFUSED and not finding.fits for finding in findings):
        raise Refused(Report(checkpoint=_source(wanted), base=base.name, findings=findings))


def _source(wanted: Separate) -> str:
    return f"extract from {', '.join(str(file) for file in wanted.files)}"


def _base_name(workspace: Workspace, folder: Path, wanted: Separate, progress: Progress) -> str:
    """The base model that the configuration names, looked for around the configuration's own folder."""
    adapter = read_adapter(open_location(str(folder)))
    return base_of_adapter(workspace, adapter, str(wanted.config.absolute().parent), progress=progress).digest.hex
