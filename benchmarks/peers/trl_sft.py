"""Steps of TRL's SFTTrainer with LoRA on chats; runs in TRL's environment.

usage: trl_sft.py SPEC.json

SPEC holds base (folder), chats (JSONL of messages), template, max_length, micro_batch,
accumulation, steps, rank, alpha, lr, pad_to (0: to the longest of a batch), output. Loss on the
assistant's tokens only. The last line is JSON: seconds of each step, samples and tokens of each,
peak memory, size of the adapter and seconds to save it.
"""

import json
import resource
import sys
import time
from pathlib import Path


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(spec["threads"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{spec['base']}/tokenizer.json", eos_token=spec["stop"], pad_token="<|pad|>"
    )
    tokenizer.chat_template = spec["template"]
    counted = {"samples": 0, "tokens": 0, "slots": 0}
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            mask = inputs["attention_mask"]
            counted["samples"] += mask.shape[0]
            counted["tokens"] += int(mask.sum())
            counted["slots"] += mask.numel()
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(spec["base"], dtype=torch.float32),
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=spec["chats"], split="train"),
        callbacks=[Clock()],
        peft_config=LoraConfig(
            r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear",
            lora_dropout=0.0, task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=spec["output"], use_cpu=True, bf16=False, fp16=False,
            per_device_train_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=spec["accumulation"],
            max_steps=spec["steps"], learning_rate=spec["lr"], max_length=spec["max_length"],
            pad_to_multiple_of=spec["pad_to"] or None, packing=False, assistant_only_loss=True,
            gradient_checkpointing=False, logging_strategy="no", save_strategy="no",
            report_to=[], disable_tqdm=True, dataloader_num_workers=0, seed=0,
        ),
    )  # fmt: skip
    trainer.train()
    started = time.perf_counter()
    trainer.model.save_pretrained(f"{spec['output']}/adapter")
    saved = time.perf_counter() - started
    size = sum(p.stat().st_size for p in Path(spec["output"], "adapter").iterdir())
    print(
        json.dumps(
            {
                "seconds": [b - a for a, b in zip(ends, ends[1:], strict=False)],
                **counted,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "adapter_bytes": size,
                "save_s": saved,
            }
        )
    )


if __name__ == "__main__":
    main()
