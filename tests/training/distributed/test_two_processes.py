"""Two processes train as one does: losses of steps, checkpoints that either goes on from, what each holds, one message.

One launch runs everything (tests/two_processes.py): starting Python and torch twice takes longer than all of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import methods
import pytest
import two_processes
from runs import common
from safetensors.torch import load_file

import config
import manifest

#: Method -> rows of a step, those of both processes together. Of 16, 56 and 14 rows the second step gets the rest: 4, 16, 6;
#: steps of pairs are full ones.
ROWS = {"sft": 12, "full": 12, "moe": 40, "soup": 8, "dpo": 4, "dpo_full": 4, "mask": 4, "mask_rows": 4}
#: What two processes go on with that one began.
RESUMED = [("sft", "fsdp2"), ("full", "ddp"), ("full", "fsdp2"), ("moe", "fsdp2"), ("mask", "ddp"), ("mask", "fsdp2"),
           ("mask_rows", "fsdp2")]
STRATEGIES = [(kind, how) for how in ("ddp", "fsdp2") for kind in ROWS]
#: A mask on whole weights whose gradients are of several draws and micro-batches, and whose scale is one for all tensors.
BY_ROWS = ("--mask_on", "weights", "--granularity", "row", "--rescale", "global", "--mask_draws", "2", "--keep_weight",
           "0.1", "--gradient_accumulation_steps", "2")


def words(pico, place, out, kind, batch, *flags):
    """A command line, with results under ``out``, which starts with the adapters that it needs."""
    if not (out / "outputs").exists():
        shutil.copytree(place / "outputs", out / "outputs")
    base = kind.partition("_")[0]
    own = list(methods.METHODS[base][0])
    if "--lora_dropout" in own:  # drawn by each process for itself
        at = own.index("--lora_dropout")
        del own[at : at + 2]
    if kind == "dpo_full":
        own += ["--tuning", "full"]
    if kind == "mask_rows":
        flags, batch = (*flags, *BY_ROWS), batch // 2
    return [*own, "--data_path", methods.data_of(place, base), *common(pico, out), *methods.CONSTANT, "--run_name",
            kind, "--device", "cpu", "--threads", "1", "--gradient_accumulation_steps", "1", "--max_steps", "3",
            "--save_steps", "2", "--per_device_train_batch_size", str(batch), *flags]


@pytest.fixture(scope="module")
def place(pico, tmp_path_factory):
    return methods.make_place(pico, tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def one(pico, place, tmp_path_factory):
    """(folder, method -> losses of its steps) of one process."""
    out = tmp_path_factory.mktemp("one")
    return out, {kind: two_processes.run(words(pico, place, out, kind, rows)) for kind, rows in ROWS.items()}


def cut(source, target, place, kind):
    """Results in which a run was killed behind its second step."""
    if not (target / "outputs").exists():
        shutil.copytree(place / "outputs", target / "outputs")
    kept = target / "checkpoints" / kind
    shutil.copytree(source / "checkpoints" / kind, kept)
    shutil.rmtree(kept / "checkpoint-3")
    return target


@pytest.fixture(scope="module")
def two(pico, place, one, tmp_path_factory):
    """(folder, (method, strategy) -> losses of its steps, what was printed) of one launch of two processes."""
    out = tmp_path_factory.mktemp("two")
    todo = {(kind, how): {"words": words(pico, place, out / how, kind, ROWS[kind] // 2), "fsdp": how == "fsdp2"}
            for kind, how in STRATEGIES}
    # micro-batches, of which the last one alone sends gradients round
    for how in ("ddp", "fsdp2"):
        todo["sft", f"{how}_accumulated"] = {
            "words": words(pico, place, out / f"{how}_accumulated", "sft", 3, "--gradient_accumulation_steps", "2"),
            "fsdp": how == "fsdp2"}
    # what one process began
    for kind, how in RESUMED:
        begun = cut(one[0], out / f"{how}_resumed_{kind}", place, kind)
        todo[kind, f"{how}_resumed"] = {"words": words(pico, place, begun, kind, ROWS[kind] // 2), "fsdp": how == "fsdp2"}
    # the second process alone meets a NaN, in its second step; last, since the launch ends by it
    todo["sft", "nan"] = {"words": words(pico, place, out / "nan", "sft", 8), "fsdp": False, "nan_on": 1}
    file = out / "runs.json"
    file.write_text(json.dumps(list(todo.values())))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531",
         str(config.ROOT / "tests" / "two_processes.py"), str(file)],
        env=os.environ | {"PYTHONPATH": str(config.ROOT)}, capture_output=True, text=True, timeout=1500, check=False)
    both = [json.loads((out / f"runs.json.{rank}").read_text()) if (out / f"runs.json.{rank}").is_file() else []
            for rank in (0, 1)]
    assert [len(found) for found in both] == [len(todo) - 1] * 2, done.stderr[-4000:]
    losses = {key: [(a + b) / 2 for a, b in zip(*pair, strict=True)]
              for key, pair in zip(todo, zip(*both, strict=True), strict=False)}
    return out, losses, done


@pytest.mark.parametrize(("kind", "how"), [*STRATEGIES, ("sft", "ddp_accumulated"), ("sft", "fsdp2_accumulated")])
def test_step_losses_equal_those_of_one_process(one, two, kind, how):
    assert len(one[1][kind]) == 3
    assert two[1][kind, how] == pytest.approx(one[1][kind], rel=1e-5)
    alone, shared = (manifest.read(out / "outputs" / kind)["metrics"] for out in (one[0], two[0] / how))
    # logged values and counts are of all processes
    assert alone["steps"] == shared["steps"] == 3
    assert alone.get("tokens") == shared.get("tokens")
    for mine, theirs in zip(alone["history"], shared["history"], strict=True):
        parts = [name for name in mine if name.startswith("loss")]
        assert [theirs[name] for name in parts] == pytest.approx([mine[name] for name in parts], rel=1e-4, abs=2e-5)


@pytest.mark.parametrize(("kind", "how"), STRATEGIES)
def test_the_run_is_a_plain_folder_as_that_of_one_process(one, two, kind, how):
    file = methods.METHODS["full" if kind == "dpo_full" else kind.partition("_")[0]][1]
    mine, theirs = (load_file(out / "outputs" / kind / file) for out in (one[0], two[0] / how))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        # Adam's step of a weight whose gradient is rounding alone may go either way
        assert (theirs[name] - tensor).abs().max() < 2e-2 * max(1.0, float(tensor.abs().max())), name
        assert (theirs[name] - tensor).abs().mean() < 2e-4, name


@pytest.mark.parametrize("kind", ["sft", "full", "dpo_full"])
def test_fsdp2_holds_half_of_what_one_process_holds(two, kind):
    parted, whole = (manifest.read(two[0] / how / "outputs" / kind)["metrics"]["held_bytes_per_process"]
                     for how in ("fsdp2", "ddp"))
    assert 0.45 * whole < parted <= 0.6 * whole


def test_processes_share_a_masks_moments_out(two):
    folder = two[0] / "ddp" / "checkpoints" / "mask" / "checkpoint-3" / "optimizer_shards"
    shards = [{name: tensor.numel() for name, tensor in load_file(file).items()} for file in sorted(folder.iterdir())]
    own = [{name.partition(".")[0] for name in shard} for shard in shards]
    assert len(own) == 2
    assert not own[0] & own[1]
    sizes = [sum(shard.values()) for shard in shards]
    assert max(sizes) <= 0.6 * sum(sizes)


@pytest.mark.parametrize("kind", ["mask", "mask_rows"])
def test_fsdp2_holds_half_of_a_mask_its_model_and_its_task_vectors(two, kind):
    parted, held = (manifest.read(two[0] / how / "outputs" / kind)["metrics"]["held_bytes_per_process"]
                    for how in ("fsdp2", "ddp"))
    # under DDP all but the moments of the logits that the other process steps
    moments = moments_of(two[0] / "ddp" / "checkpoints" / kind / "checkpoint-3")
    assert 0.45 * (held + min(moments)) < parted <= 0.6 * (held + min(moments))


def moments_of(checkpoint):
    """Bytes of the optimiser's state that each process wrote."""
    return [sum(tensor.numel() * tensor.element_size() for tensor in load_file(file).values())
            for file in sorted((checkpoint / "optimizer_shards").iterdir())]


@pytest.mark.parametrize(("kind", "how"), RESUMED)
def test_two_processes_go_on_from_a_checkpoint_of_one(one, two, kind, how):
    assert two[1][kind, f"{how}_resumed"] == pytest.approx(one[1][kind][2:], rel=1e-5)


@pytest.mark.parametrize(("kind", "how"), [("sft", "ddp"), ("sft", "fsdp2"), ("full", "fsdp2"), ("moe", "fsdp2"),
                                           ("dpo", "fsdp2"), ("mask", "ddp"), ("mask", "fsdp2"), ("mask_rows", "fsdp2")])
def test_one_process_goes_on_from_a_checkpoint_of_two(pico, place, one, two, tmp_path, kind, how):
    begun = cut(two[0] / how, tmp_path, place, kind)
    line = words(pico, place, begun, kind, ROWS[kind])
    assert two_processes.run(line) == pytest.approx(one[1][kind][2:], rel=1e-5)
    # the losses of a step's draws were added up, and their mean is logged
    draws = 2 if kind == "mask_rows" else 1
    assert manifest.read(begun / "outputs" / kind)["metrics"]["train_loss"] == pytest.approx(
        sum(one[1][kind]) / 3 / draws, rel=1e-5)


def test_a_step_of_another_number_of_rows_does_not_go_on(pico, place, two, tmp_path, capsys):
    begun = cut(two[0] / "ddp", tmp_path, place, "sft")
    with pytest.raises(SystemExit) as stop:
        two_processes.run(words(pico, place, begun, "sft", 8))
    assert stop.value.code == 2
    assert "holds checkpoints of steps of 12 rows" in capsys.readouterr().err


def test_a_checkpoint_in_parts_is_gathered_into_a_model(two, tmp_path):
    from transformers import AutoModelForCausalLM

    from models import fuse

    source = two[0] / "fsdp2" / "checkpoints" / "full" / "checkpoint-3"
    assert not (source / "model.safetensors").exists()
    assert len(list((source / "weight_shards").iterdir())) == 2
    fuse.main(["gather", str(source), "--output_dir", str(tmp_path), "--run_name", "whole"])
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (
        tmp_path / "outputs" / "whole", two[0] / "fsdp2" / "outputs" / "full"))
    assert mine.keys() == theirs.keys()
    assert all((mine[name] == theirs[name]).all() for name in mine)
    AutoModelForCausalLM.from_pretrained(tmp_path / "outputs" / "whole")


def test_a_checkpoint_of_an_adapter_is_a_plain_folder_too(two, tmp_path):
    from models import fuse

    source = two[0] / "fsdp2" / "checkpoints" / "sft" / "checkpoint-3"
    fuse.main(["gather", str(source), "--output_dir", str(tmp_path)])
    folder = tmp_path / "outputs" / "sft_checkpoint-3"
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, two[0] / "fsdp2" / "outputs" / "sft"))
    assert all((mine[name] == theirs[name]).all() for name in mine)
    assert not [path for path in folder.rglob("*") if path.name.startswith(("rng_", "optimizer"))]


def test_missing_parts_pass_a_checkpoint_over(pico, place, one, two, tmp_path, caplog):
    begun = tmp_path / "out"
    shutil.copytree(place / "outputs", begun / "outputs")
    shutil.copytree(two[0] / "fsdp2" / "checkpoints" / "sft", begun / "checkpoints" / "sft")
    max((begun / "checkpoints" / "sft" / "checkpoint-3" / "weight_shards").iterdir()).unlink()
    assert two_processes.run(words(pico, place, begun, "sft", ROWS["sft"])) == pytest.approx(one[1]["sft"][2:], rel=1e-5)
    assert any("parts of weight_shards missing; passed over" in message for message in caplog.messages)


def test_a_nan_of_one_process_ends_both_with_one_message(two):
    done = two[2]
    assert done.returncode
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told == ["error: the loss became nan at step 2; lower --learning_rate (now 0.01) or the loss weights, or use "
                    "--dtype float32"]
    assert not (two[0] / "nan" / "outputs" / "sft").exists()
    assert not list((two[0] / "nan" / "checkpoints" / "sft").glob("checkpoint-*"))
