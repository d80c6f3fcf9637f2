"""Tuning of the fused MoE: what trains, what is logged, what is refused, what is saved."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from runs import MOE, align, build_moe, common, data_flag, losses, write_data
from safetensors.torch import load_file, save_file

from config import parse
from errors import UserError
from flags import AlignArgs
from models.adapters import resident
from models.base.loading import cast_parameters, load_base
from models.moe.files import assemble, load_moe, moe_layers
from models.moe.router import low_rank_norm
from training.answers import predicting_places
from training.moe import MoeLoss, aligned_norms, token_mask
from training.trainer import FusionTrainer

OBJECTIVES = ("helpfulness", "safety", "truthfulness")
FLAGS = ("--gate_loss_weight", "0.1", "--helpfulness_weight", "0.001")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tuned(pico, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    build_moe(pico, out, data)
    align(pico, out, data, "mix", *FLAGS)
    return out


def _args(pico, out, *flags) -> AlignArgs:
    return parse(AlignArgs, [*common(pico, out), *flags]).args


def test_every_part_is_logged(tuned):
    manifest = json.loads((tuned / "outputs" / MOE / "manifest.json").read_text())
    for name in ("loss_lm", "loss_gate", "loss_share_right", *(f"loss_drift_{t}" for t in
                 ("helpfulness", "safety", "truthfulness"))):
        assert len(losses(manifest, name)) == manifest["metrics"]["steps"]
    # drift starts at zero and grows
    assert losses(manifest, "loss_drift_helpfulness")[0] == pytest.approx(0, abs=1e-6)
    assert losses(manifest, "loss_drift_helpfulness")[-1] > 0
    entry = manifest["metrics"]["history"][-1]
    assert entry["loss"] == pytest.approx(entry["loss_lm"] + 0.1 * entry["loss_gate"]
                                          + 0.001 * entry["loss_drift_helpfulness"], abs=1e-3)


def test_drift_is_the_norm_of_the_materialised_change(pico, tuned):
    args = _args(pico, tuned)
    raw, _ = assemble(tuned / "outputs" / "raw_moe", args, torch.float32, torch.device("cpu"))
    model, config = assemble(tuned / "outputs" / MOE, args, torch.float32, torch.device("cpu"))
    loss = MoeLoss(model, torch.float32, config.experts, args)
    for expert in range(3):
        norms = [(new.materialise(expert)[p] - old.materialise(expert)[p]).norm()
                 for new, old in zip(moe_layers(model), moe_layers(raw), strict=True) for p in ("gate", "up", "down")]
        found = loss.drifts([OBJECTIVES[expert]])
        assert found[f"drift_{OBJECTIVES[expert]}"].item() == pytest.approx(torch.stack(norms).mean().item(), rel=1e-4)


def batch_of_two():
    labels = torch.full((2, 6), -100)
    labels[:, 3:] = 7
    return {"input_ids": torch.arange(12).view(2, 6) + 20, "attention_mask": torch.ones(2, 6, dtype=torch.long),
            "labels": labels, "objectives": torch.tensor([0, 1])}


@pytest.mark.parametrize(("flags", "drifts"), [
    ((), ()), (("--safety_weight", "0.1"), ("safety",)),
    (("--helpfulness_weight", "0.1", "--truthfulness_weight", "1"), ("helpfulness", "truthfulness"))])
def test_a_step_computes_the_drifts_that_have_a_weight_once_and_no_others(pico, tuned, flags, drifts, monkeypatch):
    import training.moe

    args = _args(pico, tuned, *flags)
    model, config = assemble(tuned / "outputs" / MOE, args, torch.float32, torch.device("cpu"))
    counted = []
    monkeypatch.setattr(training.moe, "low_rank_norm", lambda a, b: (counted.append(len(a)), low_rank_norm(a, b))[1])
    loss = MoeLoss(model, torch.float32, config.experts, args)
    parts = loss.train()(**batch_of_two())
    assert {name for name in parts if name.startswith("drift_")} == {f"drift_{name}" for name in drifts}
    # gate, up and down, both layers at once
    assert counted == ([2, 2, 2] if drifts else [])
    # validation tells all of them, with the same values
    with torch.no_grad():
        told = loss.eval()(**batch_of_two())
    assert {name for name in told if name.startswith("drift_")} == {f"drift_{name}" for name in OBJECTIVES}
    for name in drifts:
        torch.testing.assert_close(told[f"drift_{name}"], parts[f"drift_{name}"])


@pytest.mark.parametrize("weight", ["0", "0.1"])
def test_a_gate_without_weight_pulls_no_graph(pico, tuned, weight):
    args = _args(pico, tuned, "--gate_loss_weight", weight)
    model, config = assemble(tuned / "outputs" / MOE, args, torch.float32, torch.device("cpu"))
    for moe in moe_layers(model):
        moe.router.requires_grad_()
    parts = MoeLoss(model, torch.float32, config.experts, args).train()(**batch_of_two())
    assert parts["gate"].requires_grad == (weight != "0")
    assert parts["gate"] > 0
    assert parts["lm"].requires_grad


def test_a_drift_without_weight_is_logged_as_it_stands(pico, tuned, data, tmp_path):
    """The last value that the log tells is the drift of the weights that were saved."""
    shutil.copytree(tuned / "outputs" / "raw_moe", tmp_path / "outputs" / "raw_moe")
    manifest = align(pico, tmp_path, data, "mix", "--run_name", "idle", "--safety_weight", "0.01")
    args = _args(pico, tmp_path)
    model, config = assemble(tmp_path / "outputs" / "idle", args, torch.float32, torch.device("cpu"))
    drifts = MoeLoss(model, torch.float32, config.experts, args).drifts(["helpfulness"])
    assert losses(manifest, "loss_drift_helpfulness")[-1] == pytest.approx(drifts["drift_helpfulness"].item(), abs=2e-5)
    assert losses(manifest, "loss_drift_helpfulness")[-1] > 0


def test_predicting_places_are_those_of_the_labels():
    labels = torch.tensor([[3, -100, 5, 6], [-100, 4, -100, 7]])
    # the first token of a row has nobody to predict it
    assert predicting_places(labels).tolist() == [1, 2, 4, 6]
    assert labels.tolist() == [[3, -100, 5, 6], [-100, 4, -100, 7]]


def test_places_from_the_host_change_nothing(pico, tuned):
    args = _args(pico, tuned)
    model, config = assemble(tuned / "outputs" / MOE, args, torch.float32, torch.device("cpu"))
    loss, batch = MoeLoss(model, torch.float32, config.experts, args).eval(), batch_of_two()
    with torch.no_grad():
        alone, given = loss(**batch), loss(**batch, predicting=predicting_places(batch["labels"]))
    assert alone["tokens"] == given["tokens"] == 6
    assert torch.equal(alone["lm"], given["lm"])


def test_aligned_norms_equal_the_materialised_ones(pico, tuned):
    model, _ = assemble(tuned / "outputs" / "raw_moe", _args(pico, tuned), torch.float32, torch.device("cpu"))
    layer = moe_layers(model)[1]
    for norms, name in zip(aligned_norms(layer), ("gate", "up", "down"), strict=True):
        want = [layer.materialise(e)[name].norm() for e in range(3)]
        torch.testing.assert_close(norms, torch.stack(want), rtol=1e-5, atol=1e-5)


def test_what_trains(pico, tuned, data, tmp_path):
    old, new = (load_file(tuned / "outputs" / run / "moe.safetensors") for run in ("raw_moe", MOE))
    for key, tensor in old.items():
        # routers move, the aligned factors never do
        assert torch.equal(tensor, new[key]) == (not key.endswith("router")), key
    attention = [key for key in new if key.startswith("attention.")]
    assert len(attention) == 2 * 4 * 2
    assert any(new[key].abs().sum() > 0 for key in attention if "lora_B" in key)
    shutil.copytree(tuned / "outputs" / "raw_moe", tmp_path / "outputs" / "raw_moe")
    for name, flags in (("frozen", ("--train_router", "false")), ("pub", ("--compat", "published"))):
        manifest = align(pico, tmp_path, data, "mix", *FLAGS, "--run_name", name, *flags)
        kept = load_file(tmp_path / "outputs" / name / "moe.safetensors")
        assert all(torch.equal(kept[key], old[key]) for key in old if key.endswith("router"))
        if name == "pub":
            assert all(0.55 < value < 1.56 for value in losses(manifest, "loss_gate"))
            assert losses(manifest, "loss_drift_helpfulness")[0] > 1


def test_saved_and_folded_model_equals_the_trained_one(pico, tuned):
    args = _args(pico, tuned)
    ids = torch.arange(20, 44)[None]
    trained, _ = assemble(tuned / "outputs" / MOE, args, torch.float32, torch.device("cpu"))
    folded = load_moe(tuned / "outputs" / MOE, args, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(folded(ids).logits, trained.eval()(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_is_loaded_without_its_base_in_fp32(pico, tuned, monkeypatch, dtype):
    args, folder, cpu = _args(pico, tuned), tuned / "outputs" / MOE, torch.device("cpu")
    # the same by a whole model in fp32: attention merged by PEFT, then all rounded once
    want, config = assemble(folder, args, torch.float32, cpu)
    assert config.attention
    for module in want.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    routers = [moe.router.data.clone() for moe in moe_layers(want)]
    cast_parameters(want, dtype)
    for moe, router in zip(moe_layers(want), routers, strict=True):
        moe.router.data = router
        for factors in moe.experts.values():
            factors.fold_(dtype)
    asked = []
    monkeypatch.setattr(resident, "load_base", lambda *words: asked.append(words[1]) or load_base(*words))
    model = load_moe(folder, args, dtype, cpu, packed=False)
    assert asked == [dtype]
    ours = model.state_dict()
    theirs = {name.replace(".base_layer", ""): value for name, value in want.state_dict().items() if "lora_" not in name}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_attention_that_is_not_whole_is_refused(pico, tuned, tmp_path):
    shutil.copytree(tuned / "outputs" / MOE, tmp_path / "outputs" / MOE)
    file = tmp_path / "outputs" / MOE / "moe.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.startswith("attention.") and name.endswith("lora_B.weight"))]
    save_file(tensors, file)
    with pytest.raises(UserError, match="its LoRA on attention is not whole"):
        load_moe(file.parent, _args(pico, tmp_path), torch.float32, torch.device("cpu"))


def test_token_masks():
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    attention = torch.tensor([[1, 1, 1, 1, 0]])
    found = {name: token_mask(name, attention, labels).tolist()[0] for name in ("answer", "prompt", "nonpad", "all")}
    assert found == {"answer": [0, 0, 1, 1, 0], "prompt": [1, 1, 0, 0, 0], "nonpad": [1, 1, 1, 1, 0],
                     "all": [1, 1, 1, 1, 1]}


@pytest.mark.parametrize(("flags", "says"), [
    (("--expert_topk", "4"), "--expert_topk 4: 'raw_moe' has 3 experts; allowed: 1 to 3"),
    (("--raw_moe", MOE), "is tuned already"),
    (("--raw_moe", "none"), "run 'none'"),
    (("--method", "dpo"), "--method dpo: the fused MoE is tuned with sft"),
    (("--gate_loss_weight", "-1"), "--gate_loss_weight -1.0: must be 0 or more"),
])
def test_refused(pico, tuned, data, capsys, flags, says):
    import align_basemodel

    with pytest.raises(SystemExit) as stop:
        align_basemodel.main(["--task_name", "mix", *data_flag(data, "mix"), *common(pico, tuned), "--run_name", "bad",
                              *flags])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tuned / "outputs" / "bad").exists()


def test_a_loss_that_is_no_number_ends_the_run(pico, tuned, data, capsys, monkeypatch):
    import align_basemodel

    forward = MoeLoss.forward
    monkeypatch.setattr(MoeLoss, "forward", lambda self, *a, **k: (
        parts := forward(self, *a, **k), parts.update(lm=parts["lm"] * float("nan")))[0])
    with pytest.raises(SystemExit) as stop:
        align_basemodel.main(["--task_name", "mix", *data_flag(data, "mix"), *common(pico, tuned), "--run_name", "nan"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "the loss became nan at step 1; lower --learning_rate" in err
    assert not list((tuned / "outputs").glob("*nan*"))


def test_where_losses_are_not_read_at_once_the_first_broken_one_is_told(monkeypatch):
    """As on a GPU: steps go on, and the next log line, checkpoint or end names the step and the loss."""
    trainer = FusionTrainer.__new__(FusionTrainer)
    trainer.args, trainer._broken = SimpleNamespace(learning_rate=0.5, world_size=1), None
    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "_refuse_broken_loss", lambda self: None)
        for step, loss in enumerate((1.0, 2.0, float("inf"), float("nan"), 3.0)):
            trainer.state = SimpleNamespace(global_step=step)
            trainer._watch(torch.tensor(loss))
    with pytest.raises(UserError, match=r"the loss became inf at step 3; lower --learning_rate \(now 0.5\)"):
        trainer._refuse_broken_loss()


@pytest.mark.parametrize("sizes", [(16, 8, 12), (8, 8, 16), (4, 8, 40)])
def test_labels_match_their_source(pico, tmp_path, sizes):
    from models.base.loading import load_tokenizer
    from training.samples import training_rows

    data = write_data(tmp_path, *sizes)
    args = _args(pico, tmp_path, *data_flag(data, "mix"), "--task_name", "mix")
    tokenizer = load_tokenizer(pico)
    rows, _ = training_rows(args, tokenizer, pico)
    signs = {0: "round", 1: "help with that", 2: "No"}
    for row in rows:
        answer = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert signs[row["objective"]] in answer
    assert {row["objective"] for row in rows} == {0, 1, 2}
