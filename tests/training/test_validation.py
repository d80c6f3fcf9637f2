"""Validation rows, their exact loss, the best checkpoint and early stopping: for every method that trains by gradient."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, data_of, make_place, train, weights
from runs import align, common, losses, write_data

import align_basemodel
import config
from data.encode import IGNORE
from data.records import Record
from errors import UserError
from flags import AlignArgs
from models.base.loading import load_base
from training.samples import source_of
from training.validation import share_of

STEPS = ("--eval_strategy", "steps", "--eval_steps", "2", "--validation_share", "0.25")
#: The validated weights of the *highest* loss: those are early ones, so that last and best differ.
BEST = (*STEPS, "--load_best_model_at_end", "--greater_is_better", "true")


@pytest.fixture(scope="module")
def place(pico, tmp_path_factory):
    return make_place(pico, tmp_path_factory.mktemp("validation"))


@pytest.mark.parametrize("kind", METHODS)
def test_the_best_checkpoint_is_what_is_saved(pico, place, tmp_path, kind):
    found = train(pico, place, tmp_path / "best", kind, "--max_steps", "6", *BEST)
    seen = {entry["step"]: entry["eval_loss"] for entry in found["validation_history"]}
    assert sorted(seen) == [2, 4, 6]
    best = max(seen, key=seen.get)
    assert found["best_step"] == best < 6
    assert found["validation_loss"] == pytest.approx(seen[best], rel=1e-6)
    stopped = train(pico, place, tmp_path / "stopped", kind, "--max_steps", str(best), *STEPS)
    assert stopped["validation_loss"] == pytest.approx(found["validation_loss"], rel=1e-6)
    one, two = weights(tmp_path / "best", kind), weights(tmp_path / "stopped", kind)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    last = train(pico, place, tmp_path / "last", kind, "--max_steps", "6", *STEPS)
    other = weights(tmp_path / "last", kind)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert losses({"metrics": last}, "loss") == losses({"metrics": found}, "loss"), "saving changed the training"


@pytest.mark.parametrize("kind", METHODS)
def test_validation_changes_nothing_of_the_training(pico, place, tmp_path, kind):
    share = ("--validation_share", "0.25", "--max_steps", "4")
    once = train(pico, place, tmp_path / "once", kind, *share)
    often = train(pico, place, tmp_path / "often", kind, *share, "--eval_strategy", "steps", "--eval_steps", "1")
    assert losses({"metrics": once}, "loss") == losses({"metrics": often}, "loss")
    assert len(often["validation_history"]) == 4
    assert once["validation_loss"] == often["validation_loss"]


def row_loss(model, rows):
    """(summed loss, answer tokens) over encoded rows, one by one and through transformers' whole forward."""
    total = tokens = 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
        tokens += int((labels != IGNORE).sum())
    return total, tokens


@pytest.mark.parametrize(("kind", "batch"), [("sft", 4), ("full", 4), ("moe", 5), ("soup", 4)])
def test_the_validation_loss_is_that_of_an_independent_forward(pico, place, tmp_path, kind, batch, monkeypatch):
    """Per answer token over all rows, however they fall into batches; for the MoE without gate and drift."""
    from models.runs import load_run
    from training.trainer import FusionTrainer

    rows = []
    whole = FusionTrainer.__init__

    def watched(self, *args, **kwargs):
        rows.extend(kwargs["eval_dataset"])
        whole(self, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "__init__", watched)
    found = train(pico, place, tmp_path, kind, "--max_steps", "3", "--validation_share", "0.4",
                  "--per_device_eval_batch_size", str(batch))
    assert len(rows) > batch, "several batches, of unequal tokens"
    args = config.parse(AlignArgs, ["--model_name_or_path", str(pico), "--output_dir", str(tmp_path), "--dtype",
                                    "float32"]).args
    total, tokens = row_loss(load_run(f"{kind}_run", args).model, rows)
    assert found["validation_loss"] == pytest.approx(total / tokens, rel=2e-5)
    if kind == "moe":
        assert found["validation_gate"] > 0
        assert found["validation_drift_helpfulness"] > 0
        assert 0 < found["validation_share_right"] < 1


@torch.no_grad()
def logps(model, rows, side):
    values = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        logs = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        values.append(logs[len(row["prompt_ids"]) - 1:].sum())
    return torch.stack(values)


@pytest.mark.parametrize("kind", ["dpo", "mask"])
def test_the_validation_loss_of_pairs_is_a_mean_over_pairs(pico, place, tmp_path, kind, monkeypatch):
    from contextlib import ExitStack
    from types import SimpleNamespace

    from peft import PeftModel

    from models.adapters.mixture import load_mix
    from models.adapters.resident import ResidentBase
    from models.mask.export import masked_deltas, open_mask
    from training.dpo import SafeDPOTrainer

    rows = []
    evaluate = SafeDPOTrainer.evaluate

    def watched(self, *args, **kwargs):
        rows[:] = list(self.eval_dataset)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(SafeDPOTrainer, "evaluate", watched)
    found = train(pico, place, tmp_path, kind, "--max_steps", "4", "--validation_share", "0.35",
                  "--per_device_eval_batch_size", "3", "--model_max_length", "128")
    assert len(rows) == 5
    cpu, folder = torch.device("cpu"), tmp_path / "outputs" / f"{kind}_run"
    reference = load_base(pico, torch.float32, cpu)
    if kind == "dpo":
        policy = PeftModel.from_pretrained(load_base(pico, torch.float32, cpu), folder).eval()
    else:
        reference = load_mix(tmp_path, (("aligned", 1.0),), ResidentBase(pico, torch.float32, cpu))
        policy = load_mix(tmp_path, (("aligned", 1.0),), ResidentBase(pico, torch.float32, cpu))
        # realign's own read-out, unless told otherwise, with this run's seed
        args = SimpleNamespace(results=tmp_path, cache_dir=None, model_name_or_path=str(pico))
        with ExitStack() as stack:
            mask, aligned, tasks = open_mask(folder, args, stack)
            for name, change in masked_deltas(folder, "expected", 7, (aligned, tasks), mask):
                policy.get_parameter(name).data.add_(change)
    margins = 0.1 * ((logps(policy, rows, "chosen_ids") - logps(reference, rows, "chosen_ids"))
                     - (logps(policy, rows, "rejected_ids") - logps(reference, rows, "rejected_ids")))
    assert float(margins.abs().max()) > 1e-3
    assert found["validation_loss"] == pytest.approx(float(-F.logsigmoid(margins).mean()), rel=1e-4)
    assert found["validation_rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
    assert found["validation_rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-3, abs=1e-5)


def test_embedded_like_pairs_are_validated_where_it_is_asked_for(pico, place, tmp_path, monkeypatch):
    from data.records import Pair

    monkeypatch.setattr("data.sources.load_pairs", lambda task, split, **_: [
        Pair(f"{split} question {i}", "No.", "Sure, here it is", 1) for i in range(6)])
    words = ["--moe_flag", "0", "--method", "dpo", "--task_name", "safety", *common(pico, tmp_path), "--max_steps", "2"]
    align_basemodel.main([*words, "--run_name", "plain"])
    align_basemodel.main([*words, "--run_name", "asked", "--eval_strategy", "epoch"])
    plain, asked = (json.loads((tmp_path / "outputs" / name / "manifest.json").read_text())["metrics"]
                    for name in ("plain", "asked"))
    assert "validation_loss" not in plain
    assert asked["validation_loss"] > 0


@pytest.mark.parametrize("kind", ["sft", "mask"])
def test_early_stopping_stops_also_in_a_resumed_run(pico, place, tmp_path, kind, monkeypatch):
    from transformers import Trainer

    # nothing is better than the first validation by a thousand: stops after two more
    words = ("--max_steps", "9", *STEPS, "--load_best_model_at_end", "--early_stopping_patience", "2",
             "--early_stopping_threshold", "1000")
    whole = train(pico, place, tmp_path / "whole", kind, *words)
    assert whole["steps"] == 6
    step = Trainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(pico, place, tmp_path / "cut", kind, *words)
    resumed = train(pico, place, tmp_path / "cut", kind, *words)
    assert resumed["steps"] == 6
    assert resumed["best_step"] == whole["best_step"]
    one, two = weights(tmp_path / "whole", kind), weights(tmp_path / "cut", kind)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_file_of_validation_rows(pico, place, tmp_path):
    other = write_data(tmp_path / "other", helpful=5, safe=3, questions=9)
    rows = json.loads((tmp_path / "other" / "helpfulness.json").read_text())
    (tmp_path / "other" / "helpfulness.json").write_text(json.dumps(
        [row | {"instruction": row["instruction"] + " New."} for row in rows]))
    found = align(pico, tmp_path, {"helpfulness": data_of(place, "sft")}, "helpfulness", "--moe_flag", "0",
                  "--validation_path", other["helpfulness"], "--max_steps", "2")
    again = align(pico, tmp_path, {"helpfulness": data_of(place, "sft")}, "helpfulness", "--moe_flag", "0", "--run_name",
                  "none", "--max_steps", "2")
    assert found["metrics"]["validation_loss"] > 0
    assert losses(found) == losses(again), "a validation file took rows from the training"
    assert "validation_loss" not in again["metrics"]


def test_the_share_is_exact_and_keeps_prompts_together():
    rows = [Record(f"q{i // 2}", f"a{i}", i % 2 and 1) for i in range(200)]
    train_rows, held_out = share_of(rows, 0.1, seed=3)
    assert len(train_rows) + len(held_out) == 200
    assert [sum(r.objective == k for r in held_out) for k in (0, 1)] == [10, 10]
    for objective in (0, 1):
        sides = [{r.prompt for r in side if r.objective == objective} for side in (train_rows, held_out)]
        assert not sides[0] & sides[1]
    # neither the order of the rows nor the seed of another run decides
    assert set(share_of(rows[::-1], 0.1, seed=3)[1]) == set(held_out)
    assert set(share_of(rows, 0.1, seed=4)[1]) != set(held_out)
    # rows of other prompts move no row to the other side but by the size of the share
    more = [*rows, *(Record(f"new{i}", "a", 0) for i in range(100))]
    assert {r for r in share_of(more, 0.1, seed=3)[0] if r in rows} >= set(train_rows) - set(held_out) - {
        r for r in rows if r.objective == 0}


@pytest.mark.parametrize(("words", "said"), [
    (["--eval_strategy", "steps"], "nothing to validate on; give --validation_path"),
    (["--load_best_model_at_end", "--validation_share", "0.2"], "needs validation on the way"),
    (["--early_stopping_patience", "2", "--validation_share", "0.2"], "needs validation on the way"),
    (["--eval_strategy", "sometimes", "--validation_share", "0.2"], "allowed: no, steps, epoch"),
    (["--eval_strategy", "epoch", "--validation_share", "0.2", "--metric_for_best_model", "bleu"], "does not measure it"),
    (["--validation_share", "0.2", "--validation_path", "x.json"], "drop one of the two"),
    (["--validation_share", "1.5"], "between 0 and 1"),
    (["--early_stopping_threshold", "0.1"], "goes with --early_stopping_patience"),
    (["--early_stopping_patience", "0"], "must be 1 or more"),
    (["--eval_strategy", "steps", "--eval_steps", "99", "--load_best_model_at_end", "--validation_share", "0.2"],
     "so there would be no best checkpoint"),
])
def test_what_cannot_be_validated_is_refused_before_a_model_is_loaded(pico, place, tmp_path, capsys, words, said,
                                                                      monkeypatch):
    monkeypatch.setattr("training.sft.load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        align(pico, tmp_path, {"helpfulness": data_of(place, "sft")}, "helpfulness", "--moe_flag", "0", *words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "outputs" / "helpfulness").exists()


def test_all_prompts_in_both_files_is_an_error(pico, place, tmp_path, capsys):
    file = data_of(place, "sft")
    with pytest.raises(SystemExit):
        align(pico, tmp_path, {"helpfulness": file}, "helpfulness", "--moe_flag", "0", "--validation_path", file)
    assert "every prompt of it is trained on too" in capsys.readouterr().err


def test_embedded_data_takes_no_share():
    with pytest.raises(UserError, match="embedded data has validation rows of its own"):
        config.parse(AlignArgs, ["--moe_flag", "0", "--validation_share", "0.1"])
    with pytest.raises(UserError, match="for --task_name mix give"):
        config.parse(AlignArgs, ["--validation_path", "one.json"])


def test_one_file_for_a_mix_leads_to_the_task_that_reads_one():
    with pytest.raises(UserError, match="not understood: rows.json; one file .* with --task_name dialogs"):
        source_of(config.parse(AlignArgs, ["--moe_flag", "0", "--data_path", "rows.json"]).args)


def test_the_losses_of_the_validation_are_not_those_of_a_broken_model(pico, place, tmp_path, capsys, monkeypatch):
    from training.trainer import FusionTrainer

    monkeypatch.setattr(FusionTrainer, "validation_terms", lambda *_: {"loss": (float("nan"), 3)})
    with pytest.raises(SystemExit):
        train(pico, place, tmp_path, "sft", "--max_steps", "2", "--validation_share", "0.3")
    assert "the validation loss is nan at step 2" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "outputs")
