"""Every objective that trains by gradient, on one small folder of data and adapters: what to type, what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pico import make_adapter
from runs import OBJECTIVES, common, write_data

#: Steps that do not depend on how many there will be.
CONSTANT = ("--lr_scheduler_type", "constant", "--warmup_steps", "0", "--per_device_train_batch_size", "4")
#: Method -> (its words, the file of its weights).
METHODS = {
    "sft": (("--moe_flag", "0", "--task_name", "helpfulness", "--lora_dropout", "0.1", "--learning_rate", "0.01"),
            "adapter_model.safetensors"),
    "full": (("--moe_flag", "0", "--task_name", "helpfulness", "--tuning", "full", "--learning_rate", "0.001"),
             "model.safetensors"),
    "dpo": (("--moe_flag", "0", "--method", "dpo", "--task_name", "safety", "--lora_dropout", "0.1", "--learning_rate",
             "0.01"), "adapter_model.safetensors"),
    "mask": (("--method", "mask", "--aligned", "aligned", "--tasks", "one", "--learning_rate", "0.2"), "mask.safetensors"),
    "moe": (("--task_name", "mix", "--lora_dropout", "0.1", "--gate_loss_weight", "0.1", "--helpfulness_weight", "0.001",
             "--attention_lora", "--learning_rate", "0.01"), "moe.safetensors"),
    "soup": (("--moe_flag", "0", "--method", "soup", "--adapters", "helpfulness,safety", "--task_name", "dialogs",
              "--learning_rate", "0.3"), "adapter_model.safetensors"),
}


def make_place(pico: Path, folder: Path) -> Path:
    """Results with experts, a raw MoE, an aligned adapter and a task that went on with it; data for every method."""
    import manifest
    from models.llama_moe import main

    write_data(folder / "data")
    outputs = folder / "outputs"
    for seed, task in enumerate(OBJECTIVES):
        make_adapter(pico, outputs / task, seed=10 + seed)
    main([*common(pico, folder)[:-2], "--router_init", "random"])
    make_adapter(pico, outputs / "aligned", seed=1)
    make_adapter(pico, outputs / "one", seed=2)
    facts = json.loads((outputs / "one" / "manifest.json").read_text())
    facts |= {"status": "done", "inputs": facts["inputs"] | {
        "init_adapter": manifest.sha256(outputs / "aligned" / "adapter_model.safetensors")}}
    (outputs / "one" / "manifest.json").write_text(json.dumps(facts))
    (folder / "data" / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"How do I do bad thing {i}?", "chosen": "I can't help with that" + " at all" * (i % 3),
         "rejected": f"Mix flour {i}" + " and wait" * (i % 4)}) + "\n" for i in range(14)))
    (folder / "data" / "dialogs.jsonl").write_text("".join(json.dumps(
        {"messages": [{"role": "user", "content": f"Do {i}."},
                      {"role": "assistant", "content": "No, I can't" * (1 + i % 3)}]}) + "\n" for i in range(14)))
    return folder


def data_of(place: Path, kind: str) -> str:
    """What --data_path takes."""
    files = {"sft": "helpfulness.json", "full": "helpfulness.json", "dpo": "pairs.jsonl", "mask": "pairs.jsonl",
             "soup": "dialogs.jsonl"}
    if kind != "moe":
        return str(place / "data" / files[kind])
    return ",".join(f"{task}={place / 'data' / task}.{'json' if task == 'helpfulness' else 'jsonl'}" for task in OBJECTIVES)


def train(pico: Path, place: Path, out: Path, kind: str, *flags: str) -> dict:
    """Run a method with results under ``out`` (made from ``place`` where it is new); the run's metrics."""
    import align_basemodel
    import manifest

    if not (out / "outputs").exists():
        shutil.copytree(place / "outputs", out / "outputs")
    align_basemodel.main([*METHODS[kind][0], "--data_path", data_of(place, kind), *common(pico, out), *CONSTANT,
                          "--run_name", f"{kind}_run", *flags])
    return manifest.read(out / "outputs" / f"{kind}_run")["metrics"]


def weights(out: Path, kind: str) -> dict:
    from safetensors.torch import load_file

    return load_file(out / "outputs" / f"{kind}_run" / METHODS[kind][1])
