"""A registry with something of everything, as a team has it after a while: for whoever looks at pages, and for the tests of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import tiny
from running import settings_of

from registry.combining import Making
from registry.manifest import Checkpoint, Metric
from registry.mixing import Mixture
from registry.registering import Registration
from registry.service import Registry
from registry.teamwork import Role

STEPS = (50, 100, 150, 200, 250, 300)
CARD = """# Support bot

Answers questions about **orders**. See [the guide](https://example.org/guide).

| set | accuracy |
|---|---|
| hard | 0.81 |

<script>alert("no")</script>
"""


def fill_home(folder: Path) -> tuple[Path, dict[str, str]]:
    """Make a home with all of it, to be copied. Gives the home, and tokens: one for each role, and `nlu`, a writer of that namespace."""
    with Registry(settings_of(folder / "home")) as registry:
        populate(registry, folder)
        secrets = {role.value: registry.create_token(role.value, role).secret for role in Role}
        secrets["nlu"] = registry.create_token("nlu", Role.WRITER, ["nlu"]).secret
    return folder / "home", secrets


def populate(registry: Registry, folder: Path) -> None:
    """Fill an empty registry.

    `support-bot` (two runs), `nlu/intent` (one) and `vision/caption` (one, of DoRA), trained on `tiny-llama`; an adapter `support-mix` made of
    two; one merged model in the store; shipments to staging and production with one rollback; notes, tags, aliases.
    """
    base = tiny.write_base(folder / "tiny-llama", shards=2)
    registry.add_base(str(base), name="tiny-llama")
    slow = _run(registry, folder, "support-bot", "lr-1e-4", seed=10, best_step=250, floor=0.62)
    fast = _run(registry, folder, "support-bot", "lr-3e-4", seed=40, best_step=150, floor=0.58)
    intent = _run(registry, folder, "nlu/intent", "first", seed=70, best_step=300, floor=0.31, rank=8)
    _run(registry, folder, "vision/caption", "dora", seed=90, best_step=200, floor=1.10, steps=(100, 200), is_dora=True)
    registry.note(fast[2], "Beats the slow run on the hard set.\nTone is still too formal.")
    registry.note(slow[4], '<b>bold claims</b> & "quotes" need care')
    registry.tag(fast[2], {"team": "nlu", "dataset": "tickets-2026"})
    registry.tag(slow[5], {"team": "nlu"})
    registry.set_alias(fast[2], "candidate")
    registry.set_alias(slow[4], "baseline")
    registry.combine(
        slow[4], fast[2], mixture=Mixture(method="linear", weights=(0.5, 0.5)), making=Making(adapter="support-mix")
    )
    merged = registry.merge(registry.plan(fast[2]), note="for the load test").merged
    registry.ship(slow[2], "staging", "try it")
    registry.ship(slow[4], "production", "first release")
    registry.ship(fast[2], "staging", "beats the baseline")
    registry.ship(merged, "production", "merged, for speed")
    registry.ship(fast[4], "production", "a mistake")
    registry.rollback("production", "support-bot", "answers got worse")
    registry.ship(intent[5], "production", "routing")


def _run(
    registry: Registry,
    folder: Path,
    adapter: str,
    run: str,
    *,
    seed: int,
    best_step: int,
    floor: float,
    steps: Sequence[int] = STEPS,
    rank: int = 4,
    is_dora: bool = False,
) -> list[Checkpoint]:
    made = []
    for number, step in enumerate(steps):
        place = folder / adapter / run / f"checkpoint-{step}"
        tiny.write_adapter(place, base=folder / "tiny-llama", seed=seed + number, rank=rank)
        if is_dora:
            _make_dora(place)
        (place / "README.md").write_text(CARD)
        loss = floor + abs(step - best_step) / 400 + 0.3 * math.exp(-step / 80)
        metrics = (
            Metric(name="eval_loss", value=round(loss, 5), step=step, split="eval"),
            Metric(name="loss", value=round(floor + 0.9 * math.exp(-step / 90), 5), step=step, split="train"),
            Metric(name="accuracy", value=round(0.9 - loss / 4, 4), step=step, split="eval"),
        )
        said = Registration(adapter=adapter, run=run, step=step, metrics=metrics)
        made += [each.checkpoint for each in registry.register(str(place), said).registered]
    return made


def _make_dora(place: Path) -> None:
    import json

    import numpy as np
    from safetensors.numpy import load_file, save_file

    config = json.loads((place / "adapter_config.json").read_text())
    tiny.write_json(place / "adapter_config.json", {**config, "use_dora": True})
    tensors = load_file(place / "adapter_model.safetensors")
    sizes = {name: array.shape[0] for name, array in tensors.items() if name.endswith("lora_B.weight")}
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): np.full(size, 4.0, np.float32)
        for name, size in sizes.items()
    }
    save_file({**tensors, **magnitudes}, place / "adapter_model.safetensors", {"format": "pt"})
