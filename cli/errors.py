"""Exit codes of errors; what the user reads is in `registry.wording`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from registry import errors, wording

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "something unforeseen; run again with --traceback and report it",
    2: "the command line, a reference, a filter or a setting is not acceptable",
    3: "nothing has this name, or several things have",
    4: "refused: the checkpoint does not fit, or cannot be merged",
    5: "the state of the registry forbids it: a name is taken, something is in use or there already",
    6: "a file is no checkpoint, is damaged, or holds a pickle with code",
    7: "bytes are not what was recorded: the base model changed, or a blob is damaged",
    8: "the disk or store does not take or give the bytes",
    9: "the server cannot be reached, or does not let you",
    130: "interrupted",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """What to print, and what to exit with."""

    message: str
    hint: str
    exit_code: int


# Looked up along the class tree, so a subclass exits like its parent.
_CODES: Mapping[type, int] = {
    errors.InvalidInput: 2,
    errors.MissingPackage: 2,
    errors.NotFound: 3,
    errors.Ambiguous: 3,
    errors.Refused: 4,
    errors.BelowPolicy: 4,
    errors.NotServable: 4,
    errors.NotConvertible: 4,
    errors.NothingMerged: 4,
    errors.NotFinite: 4,
    errors.Conflict: 5,
    errors.UnreadableFile: 6,
    errors.Changed: 7,
    errors.StorageFailed: 8,
    errors.OutOfMemory: 8,
    errors.ProgramFailed: 8,
    errors.ServerFailed: 9,
    errors.AccessDenied: 9,
    errors.Cancelled: 130,
}


def explain(error: Exception) -> Explanation:
    """Message, hint and exit code of an error; of one that is not the registry's own, that it was not foreseen."""
    words = wording.explain(error)
    code = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), 1)
    hint = words.hint if code != 1 or words.hint else EXIT_CODES[1]
    return Explanation(words.message, hint, code)
