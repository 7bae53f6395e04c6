"""Folders on this machine that libraries can load from: exact files of one version, kept for the next time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import BaseChanged, Refused, UnknownRepository
from registry.local_copies import used_copy, used_copy_of_base
from registry.locations import local_folder
from registry.manifest import BaseModel, Checkpoint, Level, content_digest
from registry.training_state import is_state

if TYPE_CHECKING:
    from registry.results import Repository
    from registry.service import Registry

# Files of a checkpoint that change from step to step and are read by no tokenizer.
_SILENT = re.compile(r"adapter_model\..+|lit_model\.pth.*|trainer_state\.json|training_args\.bin|README\.md")


def check_fits(registry: Registry, checkpoint: Checkpoint, base: BaseModel) -> None:
    """See that an adapter belongs to a base model. What could only not be merged may be used as it is.

    Raises:
        Refused: it does not; carries the findings that say so.
    """
    report = registry.check(checkpoint, "" if checkpoint.base == base.digest else base.name)
    if report.misfits:
        only = tuple(each for each in report.findings if each.level is not Level.REFUSED or not each.fits)
        raise Refused(replace(report, findings=only))


def merged_files(registry: Registry, checkpoint: Checkpoint) -> Repository:
    """The files of the model that merging a checkpoint gives, to be read with `Registry.read_file`.

    Raises:
        Refused: it cannot be merged.
    """
    try:
        return registry.repository(f"{checkpoint.adapter}-v{checkpoint.version}-merged")
    except UnknownRepository as error:
        report = registry.check(checkpoint)
        if report.verdict is not Level.REFUSED:
            raise
        raise Refused(report) from error


def folder_of_checkpoint(registry: Registry, checkpoint: Checkpoint) -> Path:
    """The files of a checkpoint in a folder of this machine, which is named by their digest and so never changes.

    Raises:
        Changed: a file is not what was recorded.
        StorageFailed: the disk does not take it.
    """
    with used_copy(registry, checkpoint) as folder:
        return folder  # what was used just now is not swept for long


def speech_of(checkpoint: Checkpoint) -> str:
    """A name for what a checkpoint brings to be spoken to with: the same where those files are."""
    files = checkpoint.manifest.files
    return content_digest(each for each in files if not _SILENT.fullmatch(each.path) and not is_state(each.path)).hex


def folder_of_base(registry: Registry, base: BaseModel) -> Path:
    """The folder of a base model; one that is not on this machine is copied, once.

    Raises:
        BaseChanged: the files there are not what was fingerprinted any more.
        PathNotFound: it is not there any more.
        StorageFailed: the disk does not take the copy.
    """
    folder = None if base.in_store or registry.settings.server else local_folder(base.url)
    if folder is not None:
        _check_unchanged(registry, base)
        return folder
    with used_copy_of_base(registry, base) as copy:
        return copy


def _check_unchanged(registry: Registry, base: BaseModel) -> None:
    from registry.base_models import current_base  # noqa: PLC0415 - a client of a server has no use for it

    _, changed = current_base(registry.workspace, base)
    if changed:
        raise BaseChanged(changed[0], str(base.digest), "another model's")
