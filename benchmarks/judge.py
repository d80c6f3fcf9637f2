"""Race: 1000 (prompt, answer) pairs through a ~100M 14-label judge, in batches against one at a time.

    python benchmarks/judge.py                       # 1000 pairs, three rounds
    python benchmarks/judge.py --items 60 --pairs 1  # a short look

The judge is synthesised from a seed: Llama shape, hidden 576, 30 layers (106 million parameters without the embedding), its
head centred on the pairs so that about half of them are flagged. The pairs are human-rated answers of the embedded data,
repeated in another order where more are asked for than there are. "one at a time" is the published way, transformers' own
class and the tokenizer row by row, in the same dtype (and, in a row of its own, in the checkpoint's fp32). Sides alternate,
loading and one pass before the clock starts are not timed, medians count, labels and probabilities are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BAR = 5.0
HIDDEN, FFN, HEADS, KV_HEADS, SPREAD = 576, 1536, 9, 3, 2.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000, help="(prompt, answer) pairs (default: 1000)")
    parser.add_argument("--layers", type=int, default=30, help="decoder layers (default: 30)")
    parser.add_argument("--pairs", type=int, default=3, help="A B rounds (default: 3)")
    parser.add_argument("--dtype", default="auto", help="of ours and of the first peer row, as in the commands")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch_tokens", type=int, default=4096, help="tokens of one pass (default: 4096)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32_peer", action="store_true", help="also race one at a time in the checkpoint's own fp32")
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    args = parser.parse_args(argv)
    items = pairs(args.items, args.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        synthesise(folder, args.layers, args.seed)
        judge = make(folder, args, args.dtype)
        centre(folder, judge, items[:64])
        judge = make(folder, args, args.dtype)
        sides = {"ours, batched": lambda: ours(judge, items), "one at a time": lambda: one_at_a_time(folder, args, items)}
        if args.fp32_peer:
            sides["one at a time, fp32"] = lambda: one_at_a_time(folder, args, items, "float32")
        result = race(sides, args.pairs) | {"items": len(items), "layers": args.layers, "dtype": args.dtype}
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def pairs(count: int, seed: int) -> list[Any]:
    """Human-rated answers with their prompts; from the second round on, answers of other prompts, so that none is equal."""
    import random

    from data.sources import load_judge_rows
    from evaluator.judges.protocol import Item

    rows = load_judge_rows()
    draw, found, prompts = random.Random(seed), [], [row[0] for row in rows]
    while len(found) < count:
        found += [Item(prompt, row[1]) for prompt, row in zip(prompts, rows, strict=True)]
        # equal items are judged once by ours: the race would not be one
        found = list(dict.fromkeys(found))
        draw.shuffle(prompts)
    # a short look takes answers of all kinds; the file is sorted by category
    return draw.sample(found, count) if count < len(rows) else found[:count]


def synthesise(folder: Path, layers: int, seed: int) -> None:
    """A Llama classifier with 14 labels and the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from models.base.loading import base_path, load_tokenizer

    tokenizer = load_tokenizer(base_path("embedded"))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=2048, num_labels=14,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        problem_type="multi_label_classification")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make(folder: Path, args: argparse.Namespace, dtype: str) -> Any:
    """Our judge of that folder."""
    from evaluator.judges.moderation import make as make_judge

    return make_judge("moderation", str(folder), flags(args, dtype))


def flags(args: argparse.Namespace, dtype: str) -> SimpleNamespace:
    return SimpleNamespace(cache_dir=None, dtype=dtype, device=args.device, threads=args.threads, seed=args.seed,
                           judge_max_length=0, judge_batch_tokens=args.batch_tokens, judge_prompts="", judge_compat="none",
                           judge_guard="auto")


def centre(folder: Path, judge: Any, items: Sequence[Any]) -> None:
    """Give the head rows across the pairs' mean hidden state, spread so that the largest logit is as often above 0 as below.

    A random head would flag everything: the largest of 14 logits is positive for almost every answer.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from evaluator.judges.local import Classifier

    model = Classifier.load(judge.source)
    width = model.model.score.weight.shape[1]
    # with the identity for a head the logits are the hidden states
    model.model.score = torch.nn.Linear(width, width, bias=False)
    model.model.score.weight.data = torch.eye(width)
    hidden = model.logits([judge.encode(item).ids for item in items])
    mean = hidden.mean(0)
    head = torch.randn(14, width, generator=torch.Generator().manual_seed(1))
    # across the mean: the shift along it below then moves the logits of all rows alike
    head -= (head @ mean)[:, None] * mean / mean.square().sum()
    head *= SPREAD / (hidden @ head.T).std()
    shift = (hidden @ head.T).max(1).values.median()
    head -= shift * mean / mean.square().sum()
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"score.weight": head}, file, metadata={"format": "pt"})


def ours(judge: Any, items: Sequence[Any]) -> tuple[float, list[list[float]]]:
    """(seconds, probabilities) of our judge."""
    from evaluator.judges.local import Classifier

    model = Classifier.load(judge.source)
    # one pass before the clock: the first one sets up kernels and threads
    dict(judge.judge_with(model, items[:1]))
    start = time.perf_counter()
    found = dict(judge.judge_with(model, items))
    seconds = time.perf_counter() - start
    return seconds, [list(found[i].labels.values()) for i in range(len(items))]


def one_at_a_time(folder: Path, args: argparse.Namespace, items: Sequence[Any],
                  dtype: str | None = None) -> tuple[float, list[list[float]]]:
    """(seconds, probabilities) of transformers' own class, one row after the other."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from models.base.placement import set_up_torch

    device, kind = set_up_torch(flags(args, dtype or args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=kind).to(device).eval()

    def one(item: Any) -> list[float]:
        text = f"BEGINNING OF CONVERSATION: USER: {item.prompt} ASSISTANT:{item.answer}{tokenizer.eos_token}"
        inputs = tokenizer(text, truncation=True, max_length=512, return_tensors="pt").to(device)
        return model(**inputs).logits[0].float().sigmoid().tolist()

    with torch.inference_mode():
        one(items[0])
        start = time.perf_counter()
        found = [one(item) for item in items]
    return time.perf_counter() - start, found


def race(sides: dict[str, Callable[[], tuple[float, list[list[float]]]]], rounds: int) -> dict[str, Any]:
    """Run the sides in turn; medians, and each side's labels against ours."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    said: dict[str, list[list[float]]] = {}
    for number in range(rounds):
        for name, side in sides.items():
            spent, said[name] = side()
            seconds[name].append(spent)
            print(f"round {number + 1}: {name} {spent:.1f} s", file=sys.stderr)
    # ours comes first: the others are compared with it
    mine = next(iter(said.values()))
    rows = []
    for name, found in said.items():
        apart = max(abs(a - b) for x, y in zip(mine, found, strict=True) for a, b in zip(x, y, strict=True))
        same = sum((max(x) > 0.5) == (max(y) > 0.5) for x, y in zip(mine, found, strict=True))
        rows.append({"side": name, "seconds": statistics.median(seconds[name]), "all": seconds[name],
                     "flagged": sum(max(x) > 0.5 for x in found), "same_labels": same, "largest_difference": apart})
    return {"rows": rows, "bar": BAR}


def table(result: dict[str, Any]) -> str:
    lines = ["| side | s | pairs/s | ours is x faster | bar | flagged | same label as ours | largest difference |",
             "|---|---|---|---|---|---|---|---|"]
    first = result["rows"][0]["seconds"]
    for row in result["rows"]:
        lines.append(f"| {row['side']} | {row['seconds']:.1f} | {result['items'] / row['seconds']:.1f} | "
                     f"{row['seconds'] / first:.1f} | {result['bar']} | {row['flagged']} | {row['same_labels']} of "
                     f"{result['items']} | {row['largest_difference']:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
