"""Where the modules of the model that was trained lie in the base's files.

Training sees the module tree of its library's version; files have the names they were published with. Both are the same for most models.
Where they differ, one rule must explain every module of the adapter, and no two modules may mean the same place; a rule that explains only
some of them is no rule. Nothing is ever found by the end of its name alone: towers of one model end alike.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import final

# One model under several names, a column for each: of each of its parts the beginning of the path, or a word inside the path (`.word.`).
# None: this column's model does not have this part. Where transformers 4.52 nested a family anew, the columns are: as published and as
# before 4.52, since then, the model without its head, its text model alone. A test compares what transformers renames by its own tables.
_Scheme = tuple[tuple[str | None, ...], ...]
_LLAVA: _Scheme = (
    ("language_model.model.", "model.language_model.", "language_model.", "model."),
    ("language_model.lm_head.", "lm_head.", None, "lm_head."),
    *(
        (f"{part}.", f"model.{part}.", f"{part}.", None)
        for part in ("vision_tower", "multi_modal_projector", "image_tower", "video_tower", "vision_model", "vision_embed_tokens")
    ),
)  # fmt: skip
_QWEN2_VL: _Scheme = (
    ("model.", "model.language_model.", "language_model.", "model."),
    ("lm_head.", "lm_head.", None, "lm_head."),
    ("visual.", "model.visual.", "visual.", None),
)
_QWEN3_VL: _Scheme = (
    ("model.language_model.", "language_model.", "model."),
    ("lm_head.", None, "lm_head."),
    ("model.visual.", "visual.", None),
)
_GEMMA3N: _Scheme = (
    ("model.language_model.", "language_model.", "model."),
    ("lm_head.", None, "lm_head."),
    *((f"model.{part}.", f"{part}.", None) for part in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")),
)
_EMU3: _Scheme = (
    ("text_model.model.", "model.text_model.", "text_model.", "model."),
    ("text_model.lm_head.", "lm_head.", None, "lm_head."),
    ("vqmodel.", "model.vqmodel.", "vqmodel.", None),
)
_PADDLEOCR_VL: _Scheme = (
    ("model.", "model.language_model.", "language_model."),
    ("lm_head.", "lm_head.", None),
    ("visual.", "model.visual.", "visual."),
    ("mlp_AR.", "model.projector.", "projector."),
)
_MIXTRAL: _Scheme = ((".block_sparse_moe.", ".mlp."),)
_PHIMOE: _Scheme = ((".block_sparse_moe.gate.", ".mlp.router."), (".block_sparse_moe.", ".mlp."))
_NEMOTRON_H: _Scheme = (
    ("backbone.embedding.", "model.embeddings."),
    ("backbone.", "model."),
    ("lm_head.", "lm_head."),
)
_FAMILIES: dict[str, _Scheme] = {
    **dict.fromkeys(
        ("aria", "aya_vision", "fuyu", "gemma3", "got_ocr2", "internvl", "llava", "llava_next", "llava_next_video", "llava_onevision",
         "mistral3", "mllama", "paligemma", "video_llava", "vipllava"),
        _LLAVA,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2_VL),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v"), _QWEN3_VL
    ),
    "gemma3n": _GEMMA3N,
    "emu3": _EMU3,
    "paddleocr_vl": _PADDLEOCR_VL,
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    "phimoe": _PHIMOE,
    "nemotron_h": _NEMOTRON_H,
}  # fmt: skip
_EXPERT = re.compile(r"(.*\bexperts)\.\d+(?:\..*)?")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """One rule from training-time paths to paths in the base's files, and back.

    `pairs` have the beginning of a path, or a word in it, on both sides; the longest that fits counts. `others_stay`: a path that none
    fits is the same on both sides; otherwise the other side does not have it.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    others_stay: bool = True

    def to_base(self, module: str) -> str:
        """The path in the base's files; as it is when no pair fits."""
        return _moved(module, self.pairs) or module

    def to_training(self, module: str) -> str | None:
        """The path in the model that was trained; None when that model did not have this module."""
        moved = _moved(module, [(new, old) for old, new in self.pairs])
        return module if moved is None and self.others_stay else moved


def _moved(module: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    path = f"{module}."
    fitting = [pair for pair in pairs if (pair[0] in path if pair[0].startswith(".") else path.startswith(pair[0]))]
    fitting = [
        (old, new) for old, new in fitting if new or path != old
    ]  # a module that is the whole prefix has no name left
    if not fitting:
        return None
    old, new = max(fitting, key=lambda pair: len(pair[0]))
    return path.replace(old, new, 1).removesuffix(".")


def place_of(module: str) -> str:
    """What a module is found by: itself, or for one of numbered experts their container, which files may have as one tensor."""
    match = _EXPERT.fullmatch(module)
    return match[1] if match else module


def is_in_expert(module: str) -> bool:
    """Whether a module belongs to one of numbered experts."""
    return _EXPERT.fullmatch(module) is not None


def match_names(
    modules: Iterable[str], base_names: Iterable[str], *, model_type: str = "", tied_head: str = ""
) -> Names | None:
    """Find the one rule that turns every module's path into that of a module in the base's files.

    In this order: the names as they are; the schemes known for the model's type; one change of prefix for all modules that are not there
    under their own names.

    Args:
        modules: training-time paths.
        base_names: names of the base's tensors.
        model_type: of the base's configuration.
        tied_head: name of the head that the model has though the files may not; empty text for none.

    Returns:
        The rule; None when no rule, or more than one, explains them all.
    """
    wanted = list(dict.fromkeys(map(place_of, modules)))
    there = {place_of(name.rpartition(".")[0]) for name in (*base_names, tied_head)} - {""}
    if there.issuperset(wanted):
        return Names()
    known = [names for names in _known_rules(model_type) if _explains(names, wanted, there)]
    return _only(known, wanted) or _only(list(_changes_of_prefix(wanted, there)), wanted)


def _explains(names: Names, wanted: Sequence[str], there: set[str]) -> bool:
    nowhere = ""
    found = [_moved(module, names.pairs) or (module if names.others_stay else nowhere) for module in wanted]
    if not there.issuperset(found) or len(set(found)) != len(found):
        return False
    return [names.to_training(path) for path in found] == list(wanted)  # a rule that does not lead back is none


def _only(rules: Sequence[Names], wanted: Sequence[str]) -> Names | None:
    """The first of the rules if they all say the same of these modules."""
    outcomes = {tuple(map(names.to_base, wanted)) for names in rules}
    return rules[0] if len(outcomes) == 1 else None


def _known_rules(model_type: str) -> Iterator[Names]:
    rows = _FAMILIES.get(model_type, ())
    words = all(first is not None and first.startswith(".") for first, *_ in rows)
    for old, new in permutations(range(len(rows[0]) if rows else 0), 2):
        pairs = tuple((left, right) for row in rows if (left := row[old]) and (right := row[new]))
        yield Names(pairs=pairs, others_stay=words)


def _changes_of_prefix(wanted: Sequence[str], there: set[str]) -> Iterator[Names]:
    """Every change of one prefix that explains all modules. Those that are there as they are keep their names."""
    lost = [module for module in wanted if module not in there]
    kept = [module for module in wanted if module in there]
    tops = {f"{module.split('.')[0]}." for module in lost}
    stay = dict.fromkeys(top if (top := f"{module.split('.')[0]}.") not in tops else f"{module}." for module in kept)
    for old, new in sorted(_substitutions(lost[0], there)):
        if any(path.startswith(new) if new else "." in path for path in kept):
            continue  # part of what lies there has its own name already
        names = Names(pairs=((old, new), *((path, path) for path in stay if path != old)), others_stay=False)
        if _explains(names, wanted, there):
            yield names


def _substitutions(probe: str, there: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every change of prefix that turns one module's path into that of some module of the base. Numbers of layers are no prefix."""
    parts = probe.split(".")
    for cut in range(len(parts)):
        old, rest = "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])
        if any(map(str.isdecimal, parts[1:cut])):
            return
        for path in there:
            new = path.removesuffix(rest)
            if new != path and (not new or new.endswith(".")) and not any(map(str.isdecimal, new.split("."))):
                yield old, new


@final
class Neighbours:
    """Finds the name among a base's that one which is not there may have meant, to be shown to people."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._left = 4
        self._by_end: dict[str, str] = {}
        for name in self._names:
            parts = name.split(".")
            for start in range(len(parts) - 2):  # the last three parts, or more: a shorter end says nothing
                self._by_end.setdefault(".".join(parts[start:]), name)

    def nearest(self, name: str) -> str:
        """The name that ends most alike, or else is spelt most alike (sought a few times only, as it takes long); empty text for none."""
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts) - 2))
        found = next((self._by_end[end] for end in ends if end in self._by_end), "")
        if not found and self._left > 0:
            self._left -= 1
            found = next(iter(difflib.get_close_matches(name, self._names, n=1, cutoff=0.6)), "")
        return found
