"""A short full fine-tune with B-DPO in the host of this environment, Axolotl or else TRL.

python cross_host.py TINY OUTPUT_DIR PAIRS
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

BETA = 0.3
#: What the hosts' training arguments have under the same name.
SHARED = {
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "seed": 0,
}


def axolotl(tiny: Path, output_dir: Path, data: Path) -> list[float]:
    from axolotl_runs import axolotl as command
    from axolotl_runs import write_config

    config = write_config(
        output_dir.with_suffix(".yml"),
        tiny,
        adapter=None,
        datasets=[{"path": str(data), "ds_type": "json", "type": "chat_template.default"}],
        shuffle_merged_datasets=False,  # the rows stay in the order of the file
        chat_template="tokenizer_default",
        rl_beta=BETA,
        micro_batch_size=SHARED["per_device_train_batch_size"],
        max_steps=SHARED["max_steps"],
        num_epochs=SHARED["max_steps"],
        learning_rate=SHARED["learning_rate"],
        weight_decay=SHARED["weight_decay"],
        max_grad_norm=SHARED["max_grad_norm"],
        save_strategy="steps",
        saves_per_epoch=None,
        save_steps=SHARED["max_steps"],
        output_dir=str(output_dir),
    )
    command("train", config, "--launcher", "python")
    state = output_dir / f"checkpoint-{SHARED['max_steps']}" / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def trl(tiny: Path, output_dir: Path, data: Path) -> list[float]:
    from datasets import Dataset
    from running import history, trainer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bdpo_plugin.demo.tiny import to_trl

    made = trainer(
        output_dir=output_dir,
        dataset=Dataset.from_list(to_trl(list(map(json.loads, data.read_text().splitlines())))),
        model=AutoModelForCausalLM.from_pretrained(tiny / "model"),
        tokenizer=AutoTokenizer.from_pretrained(tiny / "model"),
        lora=False,
        beta=BETA,
        **SHARED,
    )
    made.train()
    return history(made, "loss")


if __name__ == "__main__":
    tiny, output_dir = map(Path, sys.argv[1:3])
    data = output_dir.with_suffix(".jsonl")
    lines = (tiny / "train.jsonl").read_text().splitlines()[: int(sys.argv[3])]
    data.write_text("".join(f"{line}\n" for line in lines))
    host = axolotl if find_spec("axolotl") else trl
    # Axolotl takes the newline after the last turn off, as the other hosts do not.
    end = "<|im_end|>" if host is axolotl else "<|im_end|>\n"
    result = {"losses": host(tiny, output_dir, data), "end": end}
    (output_dir / "result.json").write_text(json.dumps(result))
