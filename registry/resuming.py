"""Go on with a training run from a checkpoint: lay out what its trainer resumes from, say how, and let the new run's lineage point back."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from registry.disk import appearing
from registry.errors import Conflict, NoTrainerState
from registry.inference.places import folder_of_base
from registry.manifest import Checkpoint, Format
from registry.progress import Progress, silent
from registry.training_state import LIGHTNING_STATE, Beginning, missing_state, write_beginning

if TYPE_CHECKING:
    from registry.service import Registry


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One way to go on: `tool` trains, `text` is what to type or to write into its configuration."""

    tool: str
    text: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A folder that a run can go on in. `place` is the checkpoint inside; `ways` are how, one of them is enough."""

    checkpoint: Checkpoint
    folder: Path
    place: Path
    weights_only: bool
    ways: tuple[Step, ...]


def resume(
    registry: Registry, checkpoint: Checkpoint, folder: Path, *, weights_only: bool = False, progress: Progress = silent
) -> Resumption:
    """Lay out a folder that a trainer goes on in. What is registered from it has the checkpoint as its origin.

    Args:
        registry: where the checkpoint is.
        checkpoint: which.
        folder: a new or empty one, the run's own.
        weights_only: begin anew with the adapter's weights: steps, learning rate and data from the start.
        progress: told of the bytes.

    Raises:
        NoTrainerState: what the trainer needs was not registered; tells what is missing.
        Conflict: something is in the folder already, or litgpt has no way to go on with an adapter of this kind.
        Changed: a file is not what was recorded.
        StorageFailed: the disk does not take it.
    """
    is_litgpt = checkpoint.manifest.format is Format.LITGPT
    if is_litgpt:
        _check_litgpt(checkpoint)
    elif not weights_only and (missing := missing_state(each.path for each in checkpoint.manifest.files)):
        raise NoTrainerState(checkpoint.ref, missing)
    is_anew = weights_only or is_litgpt  # litgpt keeps no state of its optimizer
    name = _place(checkpoint, is_anew=is_anew)
    began = Beginning(checkpoint=checkpoint.ref, digest=checkpoint.digest, step=checkpoint.step, weights_only=is_anew)
    with appearing(folder) as draft:
        registry.pull(checkpoint, draft / name, progress)
        write_beginning((draft / name).parent, began)
    place = folder / name
    ways = _litgpt_ways(registry, checkpoint, folder) if is_litgpt else _peft_ways(folder, place, is_anew=is_anew)
    return Resumption(checkpoint=checkpoint, folder=folder, place=place, weights_only=is_anew, ways=ways)


def _check_litgpt(checkpoint: Checkpoint) -> None:
    method = checkpoint.manifest.method
    if method != "adapter_v2":
        other = ": `ckpt convert` makes one of PEFT, which can be trained on" if method == "lora" else ""
        raise Conflict(checkpoint.ref, f"litgpt has no way to go on with an adapter of the method {method}{other}")


def _place(checkpoint: Checkpoint, *, is_anew: bool) -> str:
    """The folder's name by which the trainer knows a checkpoint."""
    if checkpoint.manifest.format is Format.LITGPT:
        return f"step-{checkpoint.step or 0:06d}"
    if is_anew:
        return "adapter"
    is_lightning = any(file.path == LIGHTNING_STATE for file in checkpoint.manifest.files)
    return f"{'adapters/step' if is_lightning else 'checkpoint'}-{checkpoint.step or 0}"


def _peft_ways(folder: Path, place: Path, *, is_anew: bool) -> tuple[Step, ...]:
    if is_anew:
        return (
            Step(tool="Python", text=f"model = PeftModel.from_pretrained(base, {str(place)!r}, is_trainable=True)"),
            Step(tool="Axolotl, in its YAML", text=f"lora_model_dir: {place}\noutput_dir: {folder}"),
            Step(tool="LLaMA-Factory, in its YAML", text=f"adapter_name_or_path: {place}\noutput_dir: {folder}"),
        )
    if (place / LIGHTNING_STATE).exists():
        text = f"trainer = Trainer(default_root_dir={str(folder)!r}, ...)\ntrainer.fit(module, ckpt_path={str(place / LIGHTNING_STATE)!r})"
        return (Step(tool="Lightning", text=text),)
    here = f"TrainingArguments(output_dir={str(folder)!r}, ...)"
    yaml = f"resume_from_checkpoint: {place}\noutput_dir: {folder}"
    return (
        Step(
            tool="Python: transformers, TRL",
            text=f"trainer = Trainer(args={here}, ...)\ntrainer.train(resume_from_checkpoint={str(place)!r})",
        ),
        Step(tool="Axolotl, LLaMA-Factory, in their YAML", text=yaml),
    )


def _litgpt_ways(registry: Registry, checkpoint: Checkpoint, folder: Path) -> tuple[Step, ...]:
    base = folder_of_base(registry, registry.base(checkpoint.base.hex))
    words = ["litgpt", "finetune_adapter_v2", str(base), "--resume", "true", "--out_dir", str(folder)]
    return (Step(tool="litgpt", text=shlex.join(words)),)
