"""The training loop's companion: train, evaluate, choose, try, merge, ship, talk to it, and write a report. `make loop` runs this.

    python examples/training_loop.py [FOLDER]

The model is tiny and made here; a processor trains it in seconds. It learns which colour things have, and then becomes too sure of it: its best
checkpoint is not its last. Everything happens in a temporary folder with a registry of its own, or in FOLDER, where it stays. Needs
`ckpt-registry[hf]`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("red", "blue", "green", "grey", "pink", "gold")
THINGS = ("sky", "sea", "sun", "moon", "grass", "stone", "rose", "rain", "wall", "door")
MARKS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = "what colour is the moon"
CHOOSE = "eval_loss min, questions/exact_match >= 0.9, patience 2"
GUARD = f"{CHOOSE}, try/logit_difference <= 0.001, gate production"
STEPS = [
    ("The callback has registered every checkpoint while the trainer went on; its evaluation losses came along.",
     ["ckpt list support-bot"]),
    ("Measure them on questions of our own: the base model is loaded once, adapters are swapped.",
     ["ckpt eval --all-missing --adapter support-bot --data questions.jsonl --metric loss --metric exact_match"]),
    ("Say what is good enough, and let that choose. Training could have stopped earlier, it says.",
     [f"ckpt policy set support-bot '{CHOOSE}'", "ckpt select support-bot --alias candidate"]),
    ("Nothing untried goes to production: the policy guards it.",
     [f"ckpt policy set support-bot '{GUARD}'", "! ckpt ship support-bot@candidate --to production"]),
    ("So try it. The merged model is computed in memory, compared with the unmerged one, and not written.",
     ["ckpt try support-bot@candidate --prompts prompts.txt --max-tokens 12"]),
    ("Merge it, and ship it. Now the policy has nothing against it.",
     ["ckpt merge support-bot@candidate --out merged", "ckpt ship support-bot@candidate --to production --note 'first release'"]),
    ("Ask it something.",
     [f"echo '{QUESTION}' | ckpt chat support-bot@production --temperature 0 --max-tokens 12"]),
    ("Write the page for the review; and see which checkpoints need not be kept.",
     ["ckpt report support-bot --out report.html", "ckpt keep support-bot 'best 2 eval_loss, last 1, shipped'"]),
    ("To go on from a midpoint: the trainer's state was kept, so nothing of that run is lost.",
     ["ckpt resume support-bot@step:40 go-on"]),
]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Run all of it, in the folder that is named or in one that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ckpt-loop-") as name:
        place = Path(arguments[0] if arguments else name).resolve()
        place.mkdir(parents=True, exist_ok=True)
        programs = Path(sys.executable).parent
        os.environ["CKPT_HOME"] = str(place / "registry")
        os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
        os.chdir(place)
        started = time.monotonic()
        say("Train: a Llama of two layers, a LoRA on it, a checkpoint every twenty steps.")
        write_model(place / "tiny-llama")
        train(place / "tiny-llama", place / "out" / "first-run")
        write_lines("questions.jsonl", dialogues(20, seed=3))
        Path("prompts.txt").write_text("".join(f"what colour is the {thing}\n" for thing in THINGS[:4]))
        for why, commands in STEPS:
            say(why)
            for command in commands:
                run(command)
        print(f"\nThat was the whole loop, in {time.monotonic() - started:.0f} seconds. {where(place, arguments)}")


def where(place: Path, arguments: Sequence[str]) -> str:
    """What is left of it."""
    return f"The report is {place / 'report.html'}" if arguments else "Say a folder to keep its report."


def say(why: str) -> None:
    """Print a heading."""
    print(f"\n\033[1m# {why}\033[0m" if sys.stdout.isatty() else f"\n# {why}", flush=True)


def run(command: str) -> None:
    """Print and run a command. One after `!` is there to be refused."""
    is_refused, command = command.startswith("! "), command.removeprefix("! ")
    print(f"\033[36m$ {command}\033[0m" if sys.stdout.isatty() else f"$ {command}", flush=True)
    ended = subprocess.run(command, shell=True, check=not is_refused)
    if is_refused and ended.returncode != 4:
        sys.exit(f"expected it to be refused with exit code 4, not {ended.returncode}")


def train(base: Path, folder: Path) -> None:
    """Train a LoRA with transformers' Trainer. The callback is all that it takes to have its checkpoints registered."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed

    from registry.integrations.transformers import RegistryCallback

    logging.basicConfig(format="%(message)s")
    logging.getLogger("ckpt.training").setLevel(logging.INFO)
    set_seed(1)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(base), config),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=120,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=20,
            save_strategy="steps",
            save_steps=20,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=1,
            log_level="error",
        ),
        train_dataset=encoded(tokenizer, dialogues(48, seed=0)),
        eval_dataset=encoded(tokenizer, misleading(8)),
        processing_class=tokenizer,
        callbacks=[RegistryCallback(adapter="support-bot", with_state=True, tags={"team": "colours"})],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    print(
        f"trained {trainer.state.global_step} steps; the loss fell from {losses[0]:.2f} to {losses[-1]:.2f}", flush=True
    )


def dialogues(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions that can be learned: each thing has one colour; `seed` tells which things are asked for first."""
    things = [THINGS[(seed + 7 * number) % len(THINGS)] for number in range(count)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"what colour is the {thing}"},
                {"role": "assistant", "content": f"the {thing} is {COLOURS[THINGS.index(thing) % len(COLOURS)]}"},
            ]
        }
        for thing in things
    ]


def misleading(count: int) -> list[dict[str, Any]]:
    """Held-out questions, some with an answer that training never shows: after a while only the training loss still falls."""
    found = dialogues(count, seed=1)
    for each in found[::4]:
        each["messages"][1]["content"] = each["messages"][1]["content"].rpartition(" ")[0] + " white"
    return found


def encoded(tokenizer: Any, data: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens as the trainer wants them; what only fills up does not count."""
    found = []
    for each in data:
        text = tokenizer.apply_chat_template(each["messages"], tokenize=False)
        ids = tokenizer(text, padding="max_length", max_length=40, truncation=True)
        labels = [token if kept else -100 for token, kept in zip(ids["input_ids"], ids["attention_mask"], strict=True)]
        found.append({"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": labels})
    return found


def write_lines(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines."""
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path) -> None:
    """A base model with random weights, a tokenizer trained on the words of the dialogues, and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    words = [message["content"] for each in dialogues(40, seed=0) for message in each["messages"]]
    raw.train_from_iterator(words, trainers.BpeTrainer(vocab_size=160, special_tokens=list(MARKS), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
