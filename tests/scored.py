"""Answers of made-up runs on disk, evaluators run on them, and what they wrote."""

from __future__ import annotations

import json

from inference import write_rows

REFUSED = "I’m sorry, but I can’t help with that."


def put_answers(results, task, outputs, sub="raw", csv_only=False):
    folder = results / "inference" / task / "test" / sub
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, [
        {"index": i, "id": f"{task}-{i}", "prompt": f"{task} prompt {i}", "input": "", "reference": f"ref\n{i}",
         "category": "ab"[i % 2], "rendered": f"<{task} {i}>", "output": output, "finish": "stop"}
        for i, output in enumerate(outputs)
    ])
    if csv_only:
        (folder / "outputs_final.jsonl").unlink()
    return folder


def scores(results, command, sub="raw"):
    return json.loads((results / "scores" / sub / f"{command}.json").read_text())


def rows(results, command, sub="raw"):
    text = (results / "scores" / sub / f"{command}.rows.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def run(module, results, *more, folder="raw"):
    module.main(["--task_name", folder, "--output_dir", str(results), *more])


def pico_flags(pico):
    return ("--model_name_or_path", str(pico), "--dtype", "float32", "--device", "cpu")
