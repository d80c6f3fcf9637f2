"""Which preset a command line takes: its own for the embedded base and data, own.yaml for anything else, and it says so."""

from __future__ import annotations

import json
import re

import pytest

import config
import preset_choice
from errors import UserError, nearest_place
from evaluator import evaluate
from flags import AlignArgs, EvaluateSafetyArgs, FuseAdaptersArgs, FuseMoeArgs, InferenceArgs, ReportArgs
from models.mask.memory import memory_plan
from models.mask.settings import Rule
from models.mask.slots import Spec
from models.mask.units import units_of

SFT = ("--moe_flag", "0", "--task_name", "helpfulness")
LLAMA = ("--model_name_or_path", "org/LLAMA")


def parse(capsys, *words, command=AlignArgs):
    """The parsed command line and what was said."""
    parsed = config.parse(command, words)
    return parsed, capsys.readouterr().err


def values(args, *names):
    return tuple(getattr(args, name) for name in names)


@pytest.fixture
def preset(tmp_path):
    def write(text: str) -> tuple[str, str]:
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return "--preset", str(tmp_path / "mine.yaml")
    return write


def test_the_embedded_base_and_data_take_the_embedded_preset(capsys):
    parsed, said = parse(capsys, *SFT)
    assert values(parsed.args, "max_train_samples", "model_max_length", "learning_rate") == (160, 192, 2e-3)
    assert said == "preset embedded (its base and data): --preset NAME takes another\n"
    assert parse(capsys, *SFT, "--model_name_or_path", "embedded")[0].args == parsed.args
    assert parse(capsys, *SFT, "--model-name-or-path=embedded")[0].args == parsed.args


def test_another_base_takes_own_and_says_why_in_its_first_line(capsys):
    parsed, said = parse(capsys, *SFT, *LLAMA, "--data_path", "mine.json")
    assert values(parsed.args, "max_train_samples", "model_max_length", "learning_rate", "num_train_epochs") == (
        -1, 2048, 2e-4, 3)
    assert parsed.args.per_device_train_batch_size * parsed.args.gradient_accumulation_steps == 16
    assert (parsed.training["lr_scheduler_type"], parsed.training["warmup_steps"]) == ("cosine", 0.03)
    assert parsed.preset == "own"
    assert said == ("preset own (--model_name_or_path org/LLAMA is not embedded's base): --preset NAME takes another\n")
    assert parse(capsys, *LLAMA, command=InferenceArgs)[0].args.max_new_tokens == 512


@pytest.mark.parametrize(("words", "rate"), [
    ((*SFT, "--tuning", "full"), 1e-5), ((*SFT, "--method", "dpo"), 1e-5),
    ((*SFT, "--method", "dpo", "--tuning", "full"), 5e-7),
    (("--method", "mask", "--tasks", "a"), 5e-3), (("--moe_flag", "1"), 5e-4), ((*SFT, "--learning_rate", "3e-3"), 3e-3)])
def test_own_has_a_rate_for_every_objective(capsys, words, rate):
    assert parse(capsys, *words, *LLAMA)[0].args.learning_rate == rate


def test_every_value_of_own_says_why():
    section = ""
    for line in (config.PRESETS / "own.yaml").read_text(encoding="utf-8").splitlines():
        section = line if re.match(r"[a-z_]+:", line) else section
        # beside the value, or beside its section for all of them
        assert "#" in line or "#" in section or line.endswith(":"), line


def test_rows_of_your_own_are_not_cut_to_the_embedded_datas_number(capsys):
    parsed, said = parse(capsys, *SFT, "--data_path", "mine.json")
    assert values(parsed.args, "max_train_samples", "model_max_length", "learning_rate") == (-1, 2048, 2e-3)
    assert said == ("preset embedded (its base; max_train_samples -1, model_max_length 2048 from preset own, because "
                    "--data_path mine.json is not its data): --preset NAME takes another\n")
    parsed, said = parse(capsys, *SFT, "--data_source", "published", "--max_train_samples", "7")
    assert values(parsed.args, "max_train_samples", "model_max_length") == (7, 2048)
    assert "max_train_samples" not in said
    assert "--data_source published is not its data" in said
    # prompts to answer are no rows to train on
    assert parse(capsys, "--data_path", "p.csv", command=InferenceArgs)[1].startswith("preset embedded (its base): ")


def test_a_preset_that_was_asked_for_is_taken_whole_and_says_what_it_was_chosen_for(capsys):
    parsed, said = parse(capsys, *SFT, "--preset", "somf", *LLAMA)
    assert values(parsed.args, "model_max_length", "per_device_train_batch_size") == (192, 4)
    assert said == ("preset somf: its values were chosen for embedded or HuggingFaceTB/SmolLM2-135M-Instruct, not for "
                    "--model_name_or_path org/LLAMA; --preset own is for any other\n")
    parsed, said = parse(capsys, *SFT, "--preset", "embedded", "--data_path", "x.json")
    assert parsed.args.max_train_samples == 160
    assert "max_train_samples 160, model_max_length 192 all the same, although --data_path x.json is not its data" in said
    assert parse(capsys, *SFT, "--preset", "somf")[1] == ""
    assert parse(capsys, *SFT, "--preset", "own", *LLAMA)[1] == ""
    assert parse(capsys, *SFT, "--preset", "h3fusion")[1] == ""


@pytest.mark.parametrize("path", ["/models/Llama-2-7b-hf", "/models/llama-2-7b-hf/", "meta-llama/Llama-2-7b-hf",
                                  "/hub/models--meta-llama--Llama-2-7b-hf/snapshots/0a1b"])
def test_a_local_copy_of_a_presets_base_is_its_base(capsys, path):
    assert parse(capsys, *SFT, "--preset", "h3fusion", "--model_name_or_path", path)[1] == ""
    assert "not for" in parse(capsys, *SFT, "--preset", "h3fusion", "--model_name_or_path", "/models/Llama-2-7b-chat-hf")[1]


def test_models_made_from_the_embedded_base_keep_its_preset(capsys, tmp_path):
    made = {"aligned": "embedded", "again": str(tmp_path / "aligned"), "other": "org/LLAMA",
            "circle": str(tmp_path / "circle")}
    for name, base in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"config": {"model_name_or_path": base}}))
    for name, taken in (("aligned", "embedded"), ("again", "embedded"), ("other", "own"), ("circle", "own")):
        assert parse(capsys, *SFT, "--model_name_or_path", str(tmp_path / name))[0].preset == taken
    (tmp_path / "aligned" / "manifest.json").write_text("[")
    assert parse(capsys, *SFT, "--model_name_or_path", str(tmp_path / "aligned"))[0].preset == "own"


@pytest.mark.parametrize(("command", "words"), [(FuseAdaptersArgs, ()), (ReportArgs, ()),
                                                (EvaluateSafetyArgs, ("--task_name", "raw", *LLAMA))])
def test_a_command_that_a_preset_gives_nothing_says_nothing(capsys, command, words):
    assert parse(capsys, *words, command=command)[1] == ""


def test_a_data_router_is_said_too(capsys):
    parsed, said = parse(capsys, *LLAMA, command=FuseMoeArgs)
    assert parsed.args.router_init == "data"
    assert said.startswith("preset own (")


def test_help_shows_the_values_that_would_be_used(capsys):
    def shown(*words):
        with pytest.raises(SystemExit) as stopped:
            config.parse(AlignArgs, [*words, "--help"])
        assert stopped.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        return " ".join(out.split())

    text = shown(*SFT, *LLAMA, "--data_path", "mine.json")
    for said in ("learning rate (default: 0.0002, preset own)", "-1: all (default: -1, preset own)",
                 "counted (default: 2048, preset own)", "org/LLAMA is not embedded's base",
                 "--warmup_steps 0.03 (preset own)"):
        assert said in text
    text = shown(*SFT, "--data_path", "mine.json")
    for said in ("learning rate (default: 0.002, preset embedded)", "-1: all (default: -1, preset own)",
                 "max_train_samples -1, model_max_length 2048 from preset own"):
        assert said in text


@pytest.mark.parametrize(("text", "said"), [
    ("for: {model_name: [x]}", "for.model_name: unknown key (did you mean model_name_or_path?)"),
    ("for: {model_name_or_path: [1]}", "for.model_name_or_path [1]: needs a name or a list of names"),
    ("for: {data_source: mine}", "for.data_source mine: not known; allowed: embedded, published"),
    ("for: {data_keys: [max_train_sample]}\nalign: {max_train_samples: 3}",
     "for.data_keys max_train_sample: no section of this preset has this key (did you mean max_train_samples?)"),
    ("for: 3", "section 'for' must hold 'key: value' lines")])
def test_a_wrong_section_for_is_named(preset, text, said):
    with pytest.raises(UserError) as caught:
        config.parse(AlignArgs, preset(text))
    assert any(said in problem and "mine.yaml" in problem for problem in caught.value.problems), caught.value.problems


def test_a_presets_own_base_is_what_it_names(capsys, preset):
    words = preset("for: {model_name_or_path: org/a}\ncommon: {model_name_or_path: org/a}\nalign: {lora_r: 3}\n")
    assert parse(capsys, *words)[1] == ""
    said = parse(capsys, *words, "--model_name_or_path", "org/b")[1]
    assert "chosen for org/a, not for --model_name_or_path org/b" in said
    # without a section for, a preset is for whatever it is given
    assert parse(capsys, *preset("align: {lora_r: 3}\n"), *LLAMA)[1] == ""


def test_every_shipped_preset_names_its_base():
    for path in config.PRESETS.glob("*.yaml"):
        content = preset_choice.read(path)
        named = content.get("for", {}).get("model_name_or_path", [])
        base = (content.get("common") or {}).get("model_name_or_path")
        assert (path.stem == "own") == (base is None)
        assert base is None or base in ([named] if isinstance(named, str) else named)


def test_the_memory_that_somf_tinyllama_names_is_what_its_mask_plans():
    """TinyLlama-1.1B: 22 layers of 2048, FFN of 5632, 4 key-value heads of 64, 32,000 tokens, a head of its own."""
    layer = {"q": (2048, 2048), "k": (256, 2048), "v": (256, 2048), "o": (2048, 2048), "gate": (5632, 2048),
             "up": (5632, 2048), "down": (2048, 5632), "norm1": (2048,), "norm2": (2048,)}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(22) for name, shape in layer.items()} | {
        "model.embed_tokens.weight": (32000, 2048), "lm_head.weight": (32000, 2048), "model.norm.weight": (2048,)}
    specs = [Spec(name, name, "weight", shape, units_of(name, shape, "element", 64, {})) for name, shape in shapes.items()]
    parameters = sum(spec.units.size for spec in specs)
    assert parameters == 1_100_048_384
    plan = memory_plan(specs, Rule("single"), 1, storage=4, logit=4, parameters=parameters, frozen=4)
    head = (config.PRESETS / "somf_tinyllama.yaml").read_text(encoding="utf-8")
    assert f"plans {plan.total / 2**30:.1f} GiB" in head
    assert f"every weight {parameters * 16 / 2**30:.1f} GiB" in head


@pytest.mark.parametrize(("text", "said"), [
    ("align:\n  learning_rate: 1e-4\n  learning_rate: 5e-3\n", "the key 'learning_rate' stands here twice; drop one"),
    ("align:\n  learning_rate: 1e-4\nalign:\n  lora_r: 4\n", "the key 'align' stands here twice"),
    ("align:\n  lr_scheduler_kwargs: {min_lr: 1e-6, min_lr: 1e-5}\n", "the key 'min_lr' stands here twice"),
    ("align:\n  [1]: 2\n", "a key must be a word"),
    ("align:\n  learning_rate: true\n", "learning_rate True: needs a number"),
    ("align:\n  lora_r: true\n", "lora_r True: needs a whole number"),
    ("align:\n  lora_targets: true\n", "lora_targets True: needs text"),
    ("align:\n  lora_targets: {q_proj: 1}\n", "lora_targets {'q_proj': 1}: needs text"),
    ("align:\n  lora_targets: [q_proj, [v_proj]]\n", "needs text"),
    ("align:\n  learning_rate:\n", "learning_rate: is empty and needs a number; give one, or drop the key"),
    ("common:\n  dtype: null\n", "dtype: is empty and needs text"),
])
def test_a_preset_that_says_nothing_or_two_things_is_refused(preset, capsys, text, said):
    """The last of two sections won, true was a learning rate of 1, and an empty value a crash after the model was loaded."""
    with pytest.raises(UserError) as stopped:
        parse(capsys, *SFT, *preset(text))
    assert len(stopped.value.problems) == 1
    assert said in stopped.value.problems[0]
    assert "mine.yaml" in stopped.value.problems[0]


def test_a_merged_mapping_may_be_overridden(preset, capsys):
    parsed, _ = parse(capsys, *SFT, *preset("common: &a\n  seed: 4\nalign:\n  <<: *a\n  seed: 5\n  lora_targets: [q, v]\n"))
    assert values(parsed.args, "seed", "lora_targets") == (5, "q,v")
    assert parse(capsys, *SFT, *preset("align:\n  data_path:\n"))[0].args.data_path is None


def test_the_table_of_several_models_says_its_preset_once(pico, tmp_path, caplog):
    words = ["--num_samples", "5", "--max_new_tokens", "6", "--output_dir", str(tmp_path)]
    with caplog.at_level("INFO"):
        evaluate.prepare(["--models", "base", "--model_name_or_path", str(pico), *words])
        assert "no model of --models" not in caplog.text
        evaluate.prepare(["--models", str(pico), *words])
    assert "preset own: no model of --models is on the base of the preset embedded" in caplog.text


def test_a_file_that_is_not_there_gets_the_nearest_name_beside_it(tmp_path):
    (tmp_path / "tickets.json").touch()
    assert nearest_place(tmp_path / "tikets.csv") == " (did you mean tickets.json?)"
    # that endings agree is no likeness; what is there, and what lies in no folder, gets no hint
    for name in ("mine.json", "tickets.json", "no/such.json"):
        assert not nearest_place(tmp_path / name)
