"""Fused MoEs that were tuned (random values in every tensor of the second stage), and exports read by nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pico import make_adapter

EXPERTS = ("helpfulness", "safety", "truthfulness")
#: Loads a folder as anybody would, answers greedily, and says what it imported.
READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = torch.tensor(ids)
with torch.no_grad():
    logits = model(inputs).logits
answer = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False)
print(json.dumps({
    "class": type(model).__name__, "dtype": str(model.dtype), "logits": logits.double().tolist(), "answer": answer.tolist(),
    "words": tokenizer.encode("Mix flour and water."), "template": tokenizer.chat_template, "config": model.config.to_dict(),
    "ours": sorted({"config", "models", "manifest", "errors", "flags", "data"} & set(sys.modules)),
}))
"""


def tuned_moe(base: Path, results: Path, name: str = "tuned", seed: int = 0, attention: bool = True) -> Path:
    """Three adapters of different ranks, the raw MoE of them, and a tuned one with random second-stage tensors."""
    import torch

    from flags import InferenceArgs
    from models.llama_moe import main
    from models.moe.files import add_tuning, assemble, moe_layers, save_moe
    from models.moe.layer import TuningConfig

    outputs = results / "outputs"
    for place, expert in enumerate(EXPERTS):
        make_adapter(base, outputs / expert, seed=10 * seed + place, r=3 + place)
    main(["--model_name_or_path", str(base), "--output_dir", str(results), "--router_init", "random", "--router_std", "0.5",
          "--device", "cpu", "--dtype", "float32"])
    args = InferenceArgs(model_name_or_path=str(base))
    model, config = assemble(outputs / "raw_moe", args, torch.float32, torch.device("cpu"))
    settings = {"tuning": TuningConfig(2, 3.0), "attention": TuningConfig(2, 5.0) if attention else None}
    add_tuning(model, settings["tuning"], settings["attention"], seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in moe_layers(model):
            for factors in layer.experts.values():
                factors.tuned_b.copy_(torch.randn(factors.tuned_b.shape, generator=generator) * 0.1)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder = outputs / name
    folder.mkdir()
    save_moe(folder, model, type(config)(**{**config.__dict__, **settings}))
    for file in (outputs / "raw_moe").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_bytes((outputs / "raw_moe" / "chat_template.jinja").read_bytes())
    return folder


def read_elsewhere(folder: Path, ids: list[list[int]], away: Path, tokens: int = 20) -> dict[str, Any]:
    """What a script that imports nothing of this repository makes of a folder, run outside of it."""
    env = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", READER, str(folder), json.dumps(ids), str(tokens)], cwd=away, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
