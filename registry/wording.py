"""What people read when something goes wrong: one sentence, and what to do next. Found along the exception's class tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from registry import errors


@dataclass(frozen=True, slots=True)
class Words:
    """A sentence, and a hint, empty where there is none."""

    message: str
    hint: str


_Explain = Callable[[Any], tuple[str, str]]


def _invalid(error: errors.InvalidInput) -> tuple[str, str]:
    return f"{error.field} {error.value!r}: {error.reason}" if error.value else f"{error.field}: {error.reason}", ""


def _setting(error: errors.InvalidSetting) -> tuple[str, str]:
    return _invalid(error)[0], "what a store has to do: docs/storage.md" if error.field == "store" else ""


def _reference(error: errors.InvalidReference) -> tuple[str, str]:
    forms = (
        "name, name@v3, name@alias, name@step:500, name@run:3, name@best:eval_loss, or 6 and more digits of a digest"
    )
    return f"{error.value!r} is not a reference: {error.reason}", f"write {forms}"


def _filter(error: errors.InvalidFilter) -> tuple[str, str]:
    pointer = f"{error.value}\n{' ' * error.position}^"
    return (
        f"cannot read the filter: {error.reason}\n{pointer}",
        "for example: --where \"metric.eval_loss < 0.9 and tag.team = 'nlu'\"",
    )


def _direction(error: errors.DirectionUnknown) -> tuple[str, str]:
    return f"is a lower or a higher {error.metric} better?", "say --min or --max"


def _mixed(error: errors.MixedData) -> tuple[str, str]:
    named = " and ".join(each[:12] if each else "data that nobody named" for each in error.data)
    return (
        f"{error.metric} was measured on different data: {named}",
        "compare those of one: --where, or measure the others again with `ckpt eval`",
    )


def _below(error: errors.BelowPolicy) -> tuple[str, str]:
    return (
        f"{error.checkpoint} is not good enough for {error.environment}: {'; '.join(error.failures)}",
        "`ckpt select` says which is; --override REASON ships it all the same, and the reason is recorded",
    )


def _no_template(error: errors.NoChatTemplate) -> tuple[str, str]:
    return (
        f"{error.name} has no chat template, nor has its base model",
        "put chat_template.jinja beside the base model's tokenizer, or use `ckpt generate --raw`, which takes text as it is",
    )


def _no_tokenizer(error: errors.NoTokenizer) -> tuple[str, str]:
    return (
        f"{error.name} has no tokenizer, nor has its base model",
        "put the tokenizer's files beside the base model's weights",
    )


def _no_state(error: errors.NoTrainerState) -> tuple[str, str]:
    return (
        f"{error.name} was registered without {', '.join(error.missing)}: its trainer cannot go on where it was",
        "--weights-only begins anew with its weights; `ckpt register --with-state` keeps the rest next time",
    )


def _program(error: errors.ProgramFailed) -> tuple[str, str]:
    return (
        f"{error.program} on {error.subject}: {error.reason}",
        "it is to print a JSON object of numbers as its last line; what others have measured is kept",
    )


def _no_memory(error: errors.OutOfMemory) -> tuple[str, str]:
    smaller = "--dtype bfloat16 takes half of float32" + ("" if error.device == "cpu" else ", --device cpu the CPU's")
    return f"{error.device} has not enough memory for {error.what}", smaller


def _unknown_policy(error: errors.UnknownPolicy) -> tuple[str, str]:
    return f"{error.name} has no policy", f'`ckpt policy set {error.name} "eval_loss min, accuracy >= 0.8"` sets one'


def _missing_package(error: errors.MissingPackage) -> tuple[str, str]:
    return f"this needs {error.package}, which is not installed", f"pip install 'ckpt-registry[{error.extra}]'"


# What lists the others of a kind, where it is not `ckpt list`.
_LISTS = {"job": "jobs list", "token": "token list"}


def _unknown(error: errors.NotFound) -> tuple[str, str]:
    listing = f"`ckpt {_LISTS.get(error.kind, 'list')}` shows what there is"
    near = f"did you mean {' or '.join(error.near[:3])}?" if error.near else listing
    return f"no {error.kind} {error.name!r}", near


def _unknown_repository(error: errors.UnknownRepository) -> tuple[str, str]:
    if error.reason:
        return f"there is no repository {error.name!r}: {error.reason}", "`ckpt check REF` tells all that is found"
    near = (
        f"did you mean {' or '.join(error.near[:3])}?"
        if error.near
        else "there are those of adapters, of adapters merged (NAME-merged), and of base models"
    )
    return f"no repository {error.name!r}", near


def _unknown_webhook(error: errors.UnknownWebhook) -> tuple[str, str]:
    return f"no webhook {error.name}", "`ckpt webhook list` shows them"


def _unknown_recipe(error: errors.UnknownRecipe) -> tuple[str, str]:
    return f"no recipe {error.name!r} is kept", "`ckpt recipe list` shows those that are"


def _unknown_signature(error: errors.UnknownSignature) -> tuple[str, str]:
    return (
        f"nobody has signed {error.name}",
        "`ckpt sign REF --key KEY` does; `--attach FILE` keeps a signature made elsewhere",
    )


def _unknown_path(error: errors.PathNotFound) -> tuple[str, str]:
    return (
        f"{error.name}: no such file or folder",
        "check the path; a base model that moved is recorded anew with `ckpt base add PATH`",
    )


def _unknown_base(error: errors.UnknownBase) -> tuple[str, str]:
    near = f"; recorded are {', '.join(error.near[:5])}" if error.near else ""
    return (
        f"base model {error.name!r} was not found",
        f"say where it is with --base PATH, or record it with `ckpt base add PATH`{near}",
    )


def _unknown_metric(error: errors.UnknownMetric) -> tuple[str, str]:
    known = (
        f"there are {', '.join(error.near[:6])}" if error.near else "record one with `ckpt metric add REF name=value`"
    )
    if not error.name:
        return (
            "the candidates share no metric whose better direction is known",
            f"name one: --best METRIC of `list`, --metric NAME of `plot`; {known}",
        )
    return f"no candidate has a finite metric {error.name!r}", known


def _unknown_environment(error: errors.UnknownEnvironment) -> tuple[str, str]:
    known = f"there are {', '.join(error.near)}" if error.near else "nothing was shipped yet: `ckpt ship REF --to ENV`"
    return f"nothing was ever shipped to {error.name!r}", known


def _ambiguous(error: errors.Ambiguous) -> tuple[str, str]:
    return f"{error.value!r} could mean any of\n  " + "\n  ".join(error.matches), "write more of it"


def _conflict(error: errors.Conflict) -> tuple[str, str]:
    return f"{error.subject}: {error.reason}", ""


def _occupied(error: errors.Conflict) -> tuple[str, str]:
    hint = "choose another folder, or remove that one" if "there already" in error.reason else ""
    return f"{error.subject}: {error.reason}", hint


def _in_use(error: errors.InUse) -> tuple[str, str]:
    return (
        f"{error.subject} is in use: {error.reason}",
        "what was shipped or merged stays, so that history stays true; aliases can be removed, and kept recipes: `ckpt recipe rm`",
    )


def _unreadable(error: errors.UnreadableFile) -> tuple[str, str]:
    return f"{error.path}: {error.reason}", ""


def _not_a_checkpoint(error: errors.UnreadableFile) -> tuple[str, str]:
    is_base = "a base model, not an adapter" in error.reason
    hint = (
        "`ckpt base add PATH` records it"
        if is_base
        else "give the folder that a PEFT or litgpt run wrote, or one checkpoint in it"
    )
    return f"{error.path}: {error.reason}", hint


def _corrupt(error: errors.UnreadableFile) -> tuple[str, str]:
    return f"{error.path} is damaged: {error.reason}", "copy or download it again, or take an earlier checkpoint"


def _pickle(error: errors.UnreadableFile) -> tuple[str, str]:
    return (
        f"{error.path} is a pickle with code in it: {error.reason}",
        "nothing was run; ask whoever made it for safetensors, and treat the file as hostile",
    )


def _refused(error: errors.Refused) -> tuple[str, str]:
    verb = "does not go with" if error.report.misfits else "cannot be merged into"
    return f"{error.report.checkpoint} {verb} {error.report.base}", "every finding is above"


def _not_servable(error: errors.NotServable) -> tuple[str, str]:
    return f"{error.engine} cannot serve {error.checkpoint}: {error.reason}", error.advice


def _not_convertible(error: errors.NotConvertible) -> tuple[str, str]:
    shown = [*error.reasons[:8], *(f"and {len(error.reasons) - 8} more" for _ in error.reasons[8:9])]
    return f"{error.subject} cannot be written as {error.target}\n  " + "\n  ".join(shown), "nothing was written"


def _changed(error: errors.Changed) -> tuple[str, str]:
    return f"{error.subject} is not what was recorded: expected {error.expected}, found {error.found}", ""


def _base_changed(error: errors.BaseChanged) -> tuple[str, str]:
    return (
        f"the base model changed: tensor {error.subject} is not what was fingerprinted; nothing was published",
        "`ckpt base verify NAME` tells which tensors differ; restore the files",
    )


def _damaged(error: errors.DamagedBlob) -> tuple[str, str]:
    return (
        f"{error.subject} is {'missing' if error.found == 'missing' else 'damaged'} in the store",
        "register the checkpoint again from its source",
    )


def _swept(error: errors.BlobSwept) -> tuple[str, str]:
    return f"{error.subject} was swept before it could be recorded", "run it again, which stores it again"


def _nothing(error: errors.NothingMerged) -> tuple[str, str]:
    return (
        f"merging would not change one element of {error.subject} (largest delta {error.largest_delta:g}); nothing was written",
        "an untrained adapter, or deltas too small for the base's dtype: try --dtype float32",
    )


def _not_finite(error: errors.NotFinite) -> tuple[str, str]:
    return (
        f"{error.tensor} would hold infinite or undefined values in {error.dtype}; nothing was published",
        "merge with --dtype float32 or bfloat16",
    )


# What to do about a failure, by what its reason says.
_REMEDIES: Mapping[str, str] = {
    "no space|too large|quota|disk is full": "free some room, then run it again: what is finished is kept",
    "permission|read-?only": "fix the permissions, then run it again: what is finished is kept",
    "install ": "install the package for this kind of store beside ckpt-registry",
    'password authentication|no password supplied|role "': "see user and password in CKPT_DATABASE_URL",
    'database "': "create the database, or correct its name in CKPT_DATABASE_URL",
    "signature|access key id|access denied|forbidden": "see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they may do",
    "no such bucket": "create the bucket, or correct its name",
    "too skewed": "set this machine's clock by NTP",
    "connection refused|could not connect|failed to resolve|timeout expired": "is it running, and is its address right?",
}


def _storage(error: errors.StorageFailed) -> tuple[str, str]:
    hint = next((hint for signs, hint in _REMEDIES.items() if re.search(signs, error.reason, re.IGNORECASE)), "")
    return f"{error.url}: {error.reason}", hint


def _cancelled(error: errors.Cancelled) -> tuple[str, str]:
    return f"{error.subject} was cancelled", "`ckpt jobs retry` goes on where it was"


def _unreachable(error: errors.Unreachable) -> tuple[str, str]:
    return (
        f"the base model {error.subject} lies at {error.reason}, which cannot be read from every machine that needs it",
        "put it back there, have a copy in the store (`ckpt base add PATH --copy`), or record a URL that all machines reach",
    )


def _server(error: errors.ServerFailed) -> tuple[str, str]:
    return f"{error.url}: {error.reason}", "is CKPT_SERVER right, and `ckpt serve` running there?"


def _unauthenticated(error: errors.Unauthenticated) -> tuple[str, str]:
    return (
        error.reason,
        "`ckpt login URL` keeps a token, or set CKPT_TOKEN; an admin makes one with `ckpt token create`",
    )


def _denied(error: errors.AccessDenied) -> tuple[str, str]:
    return error.reason, ""


# Looked up along the class tree, so a subclass without a line of its own reads like its parent.
_TABLE: Mapping[type, _Explain] = {
    errors.InvalidInput: _invalid,
    errors.InvalidSetting: _setting,
    errors.InvalidReference: _reference,
    errors.InvalidFilter: _filter,
    errors.DirectionUnknown: _direction,
    errors.MixedData: _mixed,
    errors.BelowPolicy: _below,
    errors.UnknownPolicy: _unknown_policy,
    errors.NoTokenizer: _no_tokenizer,
    errors.NoTrainerState: _no_state,
    errors.NoChatTemplate: _no_template,
    errors.OutOfMemory: _no_memory,
    errors.ProgramFailed: _program,
    errors.MissingPackage: _missing_package,
    errors.NotFound: _unknown,
    errors.PathNotFound: _unknown_path,
    errors.UnknownBase: _unknown_base,
    errors.UnknownRepository: _unknown_repository,
    errors.UnknownWebhook: _unknown_webhook,
    errors.UnknownRecipe: _unknown_recipe,
    errors.UnknownSignature: _unknown_signature,
    errors.UnknownMetric: _unknown_metric,
    errors.UnknownEnvironment: _unknown_environment,
    errors.Ambiguous: _ambiguous,
    errors.Refused: _refused,
    errors.NotServable: _not_servable,
    errors.NotConvertible: _not_convertible,
    errors.NothingMerged: _nothing,
    errors.NotFinite: _not_finite,
    errors.Conflict: _occupied,
    errors.NameTaken: _conflict,
    errors.InUse: _in_use,
    errors.UnreadableFile: _unreadable,
    errors.NotACheckpoint: _not_a_checkpoint,
    errors.CorruptFile: _corrupt,
    errors.UnsafePickle: _pickle,
    errors.Changed: _changed,
    errors.BaseChanged: _base_changed,
    errors.DamagedBlob: _damaged,
    errors.BlobSwept: _swept,
    errors.StorageFailed: _storage,
    errors.Cancelled: _cancelled,
    errors.Unreachable: _unreachable,
    errors.ServerFailed: _server,
    errors.AccessDenied: _denied,
    errors.Unauthenticated: _unauthenticated,
}


def explain(error: Exception) -> Words:
    """Sentence and hint for an error; of one that is not the registry's own, what it says itself."""
    for kind in type(error).__mro__:
        if kind in _TABLE:
            return Words(*_TABLE[kind](error))
    return Words(f"{type(error).__name__}: {error}", "")
