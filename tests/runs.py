"""Small local data in the published shapes, and commands run in-process on a pico base."""

from __future__ import annotations

import json
from pathlib import Path

OBJECTIVES = ("helpfulness", "safety", "truthfulness")
MOE = "mix_moe_reg_00010_00000_00000_gate_01000"


def write_data(folder: Path, helpful: int = 16, safe: int = 16, questions: int = 24) -> dict[str, str]:
    """Alpaca JSON, BeaverTails JSONL (half of it unsafe), TruthfulQA JSONL; task -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {task: folder / f"{task}.{'json' if task == 'helpfulness' else 'jsonl'}" for task in OBJECTIVES}
    paths["helpfulness"].write_text(json.dumps([
        {"instruction": f"Describe thing number {i}.", "input": "in detail" if i % 2 else "",
         "output": "It is round " * (1 + i % 5)} for i in range(helpful)]))
    paths["safety"].write_text("".join(json.dumps(
        {"prompt": f"How do I do bad thing {i}?", "response": "I can't help with that " * (1 + i % 3),
         "is_safe": i % 2 == 0}) + "\n" for i in range(2 * safe)))
    paths["truthfulness"].write_text("".join(json.dumps(
        {"question": f"Is claim {i} true?", "best_answer": "No, it is not", "correct_answers": ["No, it is not", "No"]})
        + "\n" for i in range(questions)))
    return {task: str(path) for task, path in paths.items()}


def common(pico: Path, out: Path) -> list[str]:
    # values of their own: those of the embedded preset are chosen for its model and move with it
    preset = str(Path(__file__).with_name("pico.yaml"))
    return ["--preset", preset, "--model_name_or_path", str(pico), "--output_dir", str(out), "--dtype", "float32",
            "--seed", "7", "--logging_steps", "1"]


def data_flag(data: dict[str, str], task: str) -> list[str]:
    return ["--data_path", data[task] if task != "mix" else ",".join(f"{t}={p}" for t, p in data.items())]


def align(pico: Path, out: Path, data: dict[str, str], task: str, *flags: str) -> dict:
    """Run align_basemodel.main and return the manifest of the run."""
    import align_basemodel
    import manifest
    from config import parse
    from flags import AlignArgs

    # no data of its own: the task's embedded rows
    words = ["--task_name", task, *(data_flag(data, task) if data else []), *common(pico, out), *flags]
    align_basemodel.main(words)
    return manifest.read(out / "outputs" / parse(AlignArgs, words).args.name)


def losses(found: dict, name: str = "loss_lm") -> list[float]:
    """A logged part of the loss, step by step."""
    return [entry[name] for entry in found["metrics"]["history"]]


def build_moe(pico: Path, out: Path, data: dict[str, str], *flags: str) -> Path:
    """Three experts and the raw MoE of them; returns the raw MoE's folder."""
    from models.llama_moe import main

    for task in OBJECTIVES:
        align(pico, out, data, task, "--moe_flag", "0", "--learning_rate", "0.01")
    main([*common(pico, out)[:-2], "--router_init", "random", *flags])
    return out / "outputs" / "raw_moe"
