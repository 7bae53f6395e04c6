"""How `examples/support-bot` was made: a tiny Llama, trained on product texts, then fine-tuned with PEFT and the Trainer on support questions.

    python examples/make_support_bot.py examples/support-bot

Needs transformers, peft and accelerate. Everything is real but small: the fine-tuning overfits on purpose, so that its best checkpoint is not
its last one.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

LENGTH = 96
PRODUCTS = ["router", "printer", "scanner", "camera", "kettle", "heater", "speaker", "monitor", "keyboard", "charger"]
PARTS = ["cable", "lid", "filter", "screen", "button", "battery", "fan", "lens", "tray", "plug"]
STATES = ["loose", "broken", "dirty", "hot", "noisy", "stuck", "wet", "slow", "dark", "bent"]
CURES = ["clean it", "replace it", "dry it", "turn it off", "push it in", "call us", "update it", "let it rest"]


def product_text(dice: random.Random) -> str:
    return f"The {dice.choice(PRODUCTS)} has a {dice.choice(PARTS)}. Keep the {dice.choice(PARTS)} away from what is {dice.choice(STATES)}. "


def support_text(dice: random.Random) -> str:
    part, state = dice.choice(PARTS), dice.choice(STATES)
    cure = CURES[(PARTS.index(part) + 3 * STATES.index(state)) % len(CURES)]
    return f"Q: My {dice.choice(PRODUCTS)} has a {state} {part}. A: The {part} is {state}, so {cure}. "


def byte_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {
        "<s>": 0,
        "</s>": 1,
        **{symbol: 2 + i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def rows(tokenizer: Any, make: Any, dice: random.Random, count: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for _ in range(count):
        text = "".join(make(dice) for _ in range(4))
        ids = torch.tensor(tokenizer(text)["input_ids"][:LENGTH])
        found.append({"input_ids": ids, "labels": ids.clone()})
    return found


def train_base(tokenizer: Any, folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model, dice = LlamaForCausalLM(config), random.Random(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(400):
        batch = torch.stack([row["input_ids"] for row in rows(tokenizer, product_text, dice, 16)])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def fine_tune(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    dice = random.Random(11)
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM", base_model_name_or_path="tiny-llama",
    )  # fmt: skip
    adapted = get_peft_model(model.float(), lora)
    adapted.peft_config["default"].base_model_name_or_path = "tiny-llama"
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=240, eval_strategy="steps", eval_steps=40, save_steps=40, save_only_model=True,
        logging_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type="constant", seed=3,
        report_to="none", use_cpu=True, disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    Trainer(
        adapted,
        arguments,
        train_dataset=rows(tokenizer, support_text, dice, 48),
        eval_dataset=rows(tokenizer, support_text, random.Random(99), 64),
    ).train()


def main(folder: Path) -> None:
    base, run = folder / "tiny-llama", folder / "support-bot"
    shutil.rmtree(base, ignore_errors=True)
    shutil.rmtree(run, ignore_errors=True)
    tokenizer = byte_tokenizer()
    fine_tune(train_base(tokenizer, base), tokenizer, run)
    for state in run.glob("checkpoint-*/training_args.bin"):
        state.unlink()  # a pickle that names code, which nobody needs
    for readme in run.glob("checkpoint-*/README.md"):
        readme.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
