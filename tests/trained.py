"""A tiny chat model with a tokenizer, and a LoRA really trained on it: the loss falls, and on held-out data the best checkpoint is not the last.

Everything is made on the spot from seeds; one training takes some seconds on a processor. Asked for by the tests that need models that work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLOURS = ("red", "blue", "green", "grey", "pink", "gold")
THINGS = ("sky", "sea", "sun", "moon", "grass", "stone", "rose", "rain", "wall", "door")
MARKS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
STEPS = (20, 40, 60, 80, 100, 120)


def dialogues(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions that can be learned: each thing has one colour; `seed` tells which things are asked for."""
    found = []
    for number in range(count):
        thing = THINGS[(seed + 7 * number) % len(THINGS)]
        colour = COLOURS[THINGS.index(thing) % len(COLOURS)]
        messages = [
            {"role": "user", "content": f"what colour is the {thing}"},
            {"role": "assistant", "content": f"the {thing} is {colour}"},
        ]
        found.append({"messages": messages})
    return found


def write_data(path: Path, count: int = 20, seed: int = 3) -> Path:
    """Dialogues as JSON lines."""
    path.write_text("".join(json.dumps(each) + "\n" for each in dialogues(count, seed)))
    return path


def write_model(folder: Path, *, seed: int = 0, template: bool = True, tokenizer: bool = True) -> Path:
    """A Llama of two layers with random weights, and a tokenizer trained on the words of the dialogues."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
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
    if tokenizer:
        _tokenizer(template=template).save_pretrained(folder)
    return folder


def _tokenizer(*, template: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    lines = [message["content"] for each in dialogues(40, 0) for message in each["messages"]]
    raw.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=160, special_tokens=list(MARKS), show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")
    if template:
        made.chat_template = TEMPLATE
    return made


def train(
    folder: Path, base: Path, *, callbacks: list[Any] | None = None, steps: tuple[int, ...] = STEPS, resume: str = ""
) -> Any:
    """Train a LoRA with transformers' Trainer, a checkpoint and an evaluation every twenty steps. Gives the trainer.

    Args:
        folder: where its checkpoints go.
        base: a model of `write_model`.
        callbacks: given to the trainer.
        steps: the last of them is when it ends.
        resume: a checkpoint's folder to go on from.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

    set_seed(1)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps[-1],
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
        data_seed=1,
        log_level="error",
    )
    # held-out questions have answers that training never shows: after a while only the training loss still falls
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_encoded(tokenizer, dialogues(64, 0)[:48]),
        eval_dataset=_encoded(tokenizer, _misleading(8)),
        callbacks=callbacks or [],
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def _misleading(count: int) -> list[dict[str, Any]]:
    found = dialogues(count, 1)
    for number, each in enumerate(found):
        if number % 4 == 0:
            each["messages"][1]["content"] = each["messages"][1]["content"].rpartition(" ")[0] + " white"
    return found


def _encoded(tokenizer: Any, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for each in data:
        text = tokenizer.apply_chat_template(each["messages"], tokenize=False)
        ids = tokenizer(text, padding="max_length", max_length=40, truncation=True)
        labels = [token if kept else -100 for token, kept in zip(ids["input_ids"], ids["attention_mask"], strict=True)]
        found.append({"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": labels})
    return found
