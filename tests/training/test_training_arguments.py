"""What transformers is told: one GPU of several, float16 with a scaled loss, noise on embeddings, checkpointing."""

from __future__ import annotations

import warnings

import pytest
import torch
from methods import METHODS, make_place, train
from runs import align, common, losses, write_data
from trl import DPOConfig

import config
from errors import UserError
from flags import AlignArgs
from training.trainer import training_arguments


@pytest.fixture(scope="module")
def place(pico, tmp_path_factory):
    return make_place(pico, tmp_path_factory.mktemp("arguments"))


def flags(pico, tmp_path, *words):
    return config.parse(AlignArgs, ["--moe_flag", "0", "--task_name", "safety", *common(pico, tmp_path), *words]).args


def test_one_of_two_visible_gpus_trains_and_says_so(pico, tmp_path, monkeypatch, caplog):
    from transformers import TrainingArguments

    # as transformers finds two GPUs without a launcher, on a machine that has none
    setup = TrainingArguments.__post_init__

    def two(self):
        setup(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", two)
    caplog.set_level("INFO")
    for kind in (TrainingArguments, DPOConfig):
        made = training_arguments(flags(pico, tmp_path, "--per_device_train_batch_size", "3"), {}, kind)
        assert made.n_gpu == 1
        # DataParallel would have read 6 rows a step
        assert made.train_batch_size == made.eval_batch_size == 3
    assert sum("2 GPUs are visible and one trains" in message for message in caplog.messages) == 2
    found = align(pico, tmp_path, write_data(tmp_path / "data"), "safety", "--moe_flag", "0", "--max_steps", "2")
    assert found["metrics"]["steps"] == 2


@pytest.mark.parametrize(("training", "said"), [({}, "2 processes: 24 rows a step"),
                                                ({"fsdp": True}, "2 processes by FSDP2: 24 rows a step")])
def test_processes_of_a_launch_say_how_many_rows_a_step_has(pico, tmp_path, monkeypatch, caplog, training, said):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    caplog.set_level("INFO")
    args = flags(pico, tmp_path, "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "4")
    training_arguments(args, training)
    assert said in caplog.messages


@pytest.mark.parametrize("kind", METHODS)
def test_float16_on_a_cpu_is_refused_before_a_model_is_loaded(pico, place, tmp_path, kind, capsys, monkeypatch):
    for module in ("sft", "soup", "mask_model"):
        monkeypatch.setattr(f"training.{module}.load_base", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("training.moe.assemble", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        train(pico, place, tmp_path, kind, "--dtype", "float16", "--device", "cpu")
    assert stop.value.code == 2
    assert "--dtype float16: training in float16 scales its loss, which needs a GPU" in capsys.readouterr().err


def test_float16_on_a_gpu_scales_the_loss(pico, tmp_path, monkeypatch):
    """transformers' float16 mode, which makes the scaler; auto picks float16 where a GPU has no bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    seen = []

    def kind(**values):
        seen.append(values)
        raise ValueError("seen")

    kind.__name__ = "Kind"
    for dtype in ("auto", "float16", "float32", "bfloat16"):
        with pytest.raises(UserError, match="seen"):
            training_arguments(flags(pico, tmp_path, "--dtype", dtype), {}, kind)
    assert [values["fp16"] for values in seen] == [True, True, False, False]


def test_the_scale_survives_a_checkpoint_without_pickle(tmp_path):
    from types import SimpleNamespace

    from training.checkpoints import SafeCheckpoints

    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=7)
    scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    one = SafeCheckpoints()
    one.args, one.accelerator = SimpleNamespace(should_save=True), SimpleNamespace(scaler=scaler)
    one._save_scaler(str(tmp_path))
    two = SafeCheckpoints()
    two.accelerator = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    two._load_scaler(str(tmp_path))
    assert two.accelerator.scaler.state_dict() == scaler.state_dict()
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize("kind", ["sft", "full", "moe", "soup"])
def test_noise_on_embeddings_trains_and_is_gone_in_validation(pico, place, tmp_path, kind):
    words = ("--max_steps", "3", "--validation_share", "0.25", "--learning_rate", "0")
    # the router has a rate of its own
    words += ("--train_router", "false") if kind == "moe" else ()
    plain = train(pico, place, tmp_path / "plain", kind, *words)
    none = train(pico, place, tmp_path / "none", kind, *words, "--neftune_noise_alpha", "0")
    noisy = train(pico, place, tmp_path / "noisy", kind, *words, "--neftune_noise_alpha", "20")
    assert losses({"metrics": none})[0] == pytest.approx(losses({"metrics": plain})[0], rel=0.05)
    assert losses({"metrics": noisy}) != losses({"metrics": none})
    # at a rate of 0 the weights stay, so without noise the validation loss does too
    assert noisy["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-6)


def test_the_noise_has_the_published_size(pico, tmp_path):
    """Uniform in +-alpha / sqrt(tokens x width) (Jain et al. 2023, arXiv 2310.05914, section 2)."""
    from transformers.integrations.neftune import activate_neftune

    from models.base.loading import load_base
    from training.answers import AnswerModel

    model = AnswerModel(load_base(pico, torch.float32, torch.device("cpu")), torch.float32).train()
    ids = torch.arange(10, 60)[None]
    before = model.get_input_embeddings()(ids)
    activate_neftune(model, 5.0)
    noise = model.get_input_embeddings()(ids) - before
    bound = 5.0 / (50 * before.shape[-1]) ** 0.5
    assert bound * 0.95 < float(noise.abs().max()) <= bound
    assert not (model.eval().get_input_embeddings()(ids) - before).any()


@pytest.mark.parametrize("kind", ["dpo", "mask"])
def test_noise_on_packed_pairs_is_refused(pico, place, tmp_path, kind, capsys):
    with pytest.raises(SystemExit):
        train(pico, place, tmp_path, kind, "--neftune_noise_alpha", "5")
    assert "--neftune_noise_alpha 5: its noise is scaled by the length of a row" in capsys.readouterr().err


def test_checkpointing_of_activations_gives_the_same_losses_without_a_warning(pico, place, tmp_path):
    plain = train(pico, place, tmp_path / "plain", "sft", "--max_steps", "3")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gradient_checkpointing_enable.*")
        saved = train(pico, place, tmp_path / "saved", "sft", "--max_steps", "3", "--gradient_checkpointing")
    assert losses({"metrics": saved}) == pytest.approx(losses({"metrics": plain}), abs=1e-5)
