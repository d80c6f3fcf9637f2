"""Local judges on planted weights: their numbers are worked out apart, not read back from them."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from planted import expected, flags, ids_of, make_judge, sigmoid, token
from safetensors.torch import load_file, save_file

from errors import UserError
from evaluator.judges import guard, local, moderation, pairwise, reward, truth_info
from evaluator.judges.prompts import fill, load_prompts
from evaluator.judges.protocol import Item

NAMES = tuple(f"harm {i}" for i in range(14))
#: label 3 fires on X, label 5 a little, all others never
HEAD = {i: (-1.0, 0.0) for i in range(14)} | {3: (-1.0, 5.0), 5: (-1.2, 0.2)}
WRAPPED = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:{}"
END = "<|im_end|>"
TEXTS = [("Why?", ""), ("How do I bake bread?", "Mix flour."), ("Tell me", "X" * 30), ("A", "XX and {answer} % {"),
         ("Ünï çödé 你好", "多语言 ответ\nnew\n\nlines X"), ("Long", "word " * 90), ("X", "X")]
ITEMS = [Item(prompt, answer) for prompt, answer in TEXTS]


@pytest.fixture(scope="module")
def head14(tmp_path_factory):
    return make_judge(tmp_path_factory.mktemp("moderation"), 14, HEAD, names=NAMES)


def said(judge, items):
    found = dict(judge.judge(items))
    assert sorted(found) == list(range(len(items)))
    return [found[i] for i in range(len(items))]


def prompts_file(folder, **sections):
    path = folder / "prompts.yaml"
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def test_moderation_by_hand(head14):
    judge = moderation.make("moderation", str(head14), flags())
    found = said(judge, ITEMS)
    for (prompt, answer), verdict in zip(TEXTS, found, strict=True):
        probabilities = sigmoid(expected(ids_of(WRAPPED.format(prompt, answer) + END), HEAD, 14))
        assert list(verdict.labels) == list(NAMES)
        assert list(verdict.labels.values()) == pytest.approx(probabilities.tolist(), abs=2e-6)
        assert verdict.score == pytest.approx(probabilities.max(), abs=2e-6)
        assert verdict.label == (probabilities.max() > 0.5)
        assert verdict.note == ""
    assert {verdict.label for verdict in found} == {True, False}


def test_moderation_cuts_on_the_right_and_says_so(head14):
    item = Item("Why?", "fine " * 30 + "X" * 200)
    ids = ids_of(WRAPPED.format("Why?", item.answer))
    judge = moderation.make("moderation", str(head14), flags(judge_max_length=60))
    (cut,) = said(judge, [item])
    assert cut.note == "truncated"
    # the X and the end token are lost with the cut
    assert cut.score == pytest.approx(sigmoid(expected(ids[:60], HEAD, 14)).max(), abs=2e-6)
    (whole,) = said(moderation.make("moderation", str(head14), flags()), [item])
    assert whole.note == ""
    assert whole.label
    assert not cut.label


def test_moderation_default_and_published_lengths(head14):
    item = Item("Why?", "word " * 700)
    for args, length, templated in ((flags(), 512, False), (flags(judge_compat="published"), 256, True)):
        judge = moderation.make("moderation", str(head14), args)
        assert len(judge.encode(item).ids) == length == judge.max_length
        assert judge.encode(item).cut
        assert judge.templated is templated


def test_long_answers_of_100_000_characters(head14):
    judge = moderation.make("moderation", str(head14), flags())
    first, second = said(judge, [Item("p", "X " * 50_000), Item("p", "a " * 50_000)])
    assert (first.label, first.note, second.label, second.note) == (True, "truncated", False, "truncated")


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("labels", [14, 1])
def test_batches_give_what_transformers_gives_for_each_row_alone(tmp_path, labels, pad_is_eos):
    from pico import pico_tokenizer
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    tokenizer = pico_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, num_labels=labels,
                         pad_token_id=tokenizer.eos_token_id if pad_is_eos else tokenizer.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = local.find("judge", str(tmp_path), flags(), labels)
    rows = [[*ids_of(prompt + answer), *[tokenizer.eos_token_id] * (i % 2)] for i, (prompt, answer) in enumerate(TEXTS)]
    model = local.Classifier.load(source)
    together = model.logits(rows)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for row, mine in zip(rows, together, strict=True):
        assert torch.allclose(mine, model.logits([row])[0], atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(mine, theirs(torch.tensor([row])).logits[0], atol=1e-5)


def test_an_encoder_is_masked_where_it_is_padded(tmp_path):
    from pico import pico_tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                        max_position_embeddings=512, num_labels=1, initializer_range=0.3)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    judge = reward.make("reward", str(tmp_path), flags())
    items = [Item(prompt, answer, "other") for prompt, answer in TEXTS]
    for item, verdict in zip(items, said(judge, items), strict=True):
        assert said(judge, [item])[0].score == pytest.approx(verdict.score, abs=1e-5)
        ids = tokenizer(item.prompt, item.answer)["input_ids"]
        assert verdict.score == pytest.approx(float(local.Classifier.load(judge.source).logits([ids])), abs=1e-5)


def test_readers_batches_equal_single_rows_and_transformers(pico):
    from transformers import AutoModelForCausalLM

    source = local.find("guard", str(pico), flags())
    model = local.Reader.load(source)
    theirs = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    rows = [ids_of(prompt + answer) for prompt, answer in TEXTS]
    together = model.next_logprobs(rows, (5, 77))
    for row, mine in zip(rows, together, strict=True):
        with torch.no_grad():
            logprobs = theirs(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        assert torch.allclose(mine, logprobs[[5, 77]], atol=1e-5)
        assert torch.allclose(mine, model.next_logprobs([row], (5, 77))[0], atol=1e-5)


def test_batches_are_longest_first_and_within_the_budget():
    lengths = [3, 10, 1, 7, 10, 25, 2]
    groups = list(local.batches(lengths, 20))
    assert groups == [[5], [1, 4], [3, 0], [6, 2]]
    # what an interrupted run left undone falls into the same batches again
    left = [i for group in groups[2:] for i in group]
    assert [[left[i] for i in group] for group in local.batches([lengths[i] for i in left], 20)] == groups[2:]
    assert list(local.batches([], 20)) == []
    assert list(local.batches([0, 0], 1)) == [[0], [1]]
    # short rows are not padded to a long one: 175 is within an eighth of 200, 84 within 16 tokens of 100
    assert list(local.batches([100, 200, 175, 176, 84, 83], 10_000)) == [[1, 3, 2], [0, 4], [5]]


GUARD_HEAD = {token("unsafe"): (0.2, 3.5), token("safe"): (1.0, 0.0)}


def chat(prompt, answer):
    return (f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>assistant\n")


def test_guard_by_hand(tmp_path):
    judge = guard.make("guard", str(make_judge(tmp_path, 0, GUARD_HEAD)), flags())
    found = said(judge, ITEMS)
    for (prompt, answer), verdict in zip(TEXTS, found, strict=True):
        logits = expected(ids_of(chat(prompt, answer)), GUARD_HEAD, 384)
        weights = np.exp(logits - logits.max())
        unsafe, safe = (weights[t] / weights.sum() for t in GUARD_HEAD)
        assert verdict.labels == pytest.approx({"unsafe": unsafe, "safe": safe}, abs=2e-6)
        assert verdict.score == pytest.approx(unsafe / (unsafe + safe), abs=2e-6)
        assert verdict.label == (unsafe > safe)
    assert {verdict.label for verdict in found} == {True, False}


def test_guard_that_would_write_something_else_gave_no_verdict(tmp_path):
    judge = guard.make("guard", str(make_judge(tmp_path, 0, {token("Sorry"): (9.0, 0.0)})), flags())
    assert [(v.label, v.score, v.note) for v in said(judge, ITEMS[:2])] == [(None, None, "unparsed")] * 2


def test_guards_cut_the_answer_and_keep_the_cue(tmp_path):
    judge = guard.make("guard", str(make_judge(tmp_path, 0, GUARD_HEAD, positions=128)), flags())
    item = Item("Why?", "a b c " * 500)
    (verdict,) = said(judge, [item])
    assert verdict.note == "truncated"
    from evaluator.judges.prompts import fit_length
    ids = fit_length(item, judge.encode, 128).ids
    assert 120 < len(ids) <= 128
    tail = ids_of("<|im_end|>\n<|im_start|>assistant\n")
    assert ids[-len(tail):] == tail


def test_behaviour_reads_yes_and_no(tmp_path):
    head = {token("Yes"): (-2.0, 4.0), token("No"): (1.0, 0.0)}
    judge = guard.make("behaviour", str(make_judge(tmp_path, 0, head)), flags())
    text = fill(load_prompts()["behaviour"].text, Item("p", "XX"))
    logits = expected(ids_of(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"), head, 384)
    yes, no = (logits[t] for t in head)
    (verdict,) = said(judge, [Item("p", "XX")])
    assert verdict.score == pytest.approx(sigmoid(yes - no), abs=2e-6)
    assert "p" in text
    assert "XX" in text


@pytest.mark.parametrize(("name", "cue"), [("truth", "True:"), ("info", "Helpful:")])
def test_truth_and_info_by_hand(tmp_path, name, cue):
    yes = token(" yes")
    head = {yes: (0.5, 6.0)}
    judge = truth_info.make(name, str(make_judge(tmp_path, 0, head, chat=False)), flags())
    found = said(judge, ITEMS)
    for (prompt, answer), verdict in zip(TEXTS, found, strict=True):
        logits = expected(ids_of(f"Q: {prompt}\nA: {answer}\n{cue}"), head, 384)
        probability = np.exp(logits[yes]) / np.exp(logits).sum()
        assert verdict.score == pytest.approx(probability, abs=2e-6)
        assert verdict.label == (probability >= 0.5)
    assert {verdict.label for verdict in found} == {True, False}


def test_pairwise_by_hand_in_both_orders(tmp_path):
    # place A is read twice, so the head can tell the places apart
    text = "{answer}{answer}{other}?"
    head = {token("A"): (0.5, 3.0), token("B"): (2.0, 0.0)}
    folder = make_judge(tmp_path, 0, head, chat=False)
    own = prompts_file(tmp_path, pairwise={"chat": "none", "text": text, "word": "A", "against": "B"})
    judge = pairwise.make("pairwise", str(folder), flags(judge_prompts=own))
    items = [Item("q", "X" * 6, "abcdef"), Item("q", "abcdef", "X" * 6), Item("q", "same", "same"), Item("q", "", "X")]
    found = said(judge, items)

    def place_a(a, b):
        logits = expected(ids_of(f"{a}{a}{b}?"), head, 384)
        return sigmoid(logits[token("A")] - logits[token("B")])

    for item, verdict in zip(items, found, strict=True):
        first, second = place_a(item.answer, item.other), 1 - place_a(item.other, item.answer)
        assert verdict.score == pytest.approx((first + second) / 2, abs=2e-6)
        assert verdict.labels == pytest.approx({"in place A": first, "in place B": second}, abs=2e-6)
        assert verdict.label == (None if (first > 0.5) != (second > 0.5) else first > 0.5)
    assert [verdict.label for verdict in found[:3]] == [True, False, None]
    # turning the pair round turns the score round
    assert found[0].score == pytest.approx(1 - found[1].score, abs=2e-6)
    assert found[2].score == pytest.approx(0.5)
    assert found[2].note == ""


def test_pairwise_without_a_letter_is_unparsed(tmp_path):
    judge = pairwise.make("pairwise", str(make_judge(tmp_path, 0, {token("Sorry"): (9.0, 0.0)})), flags())
    assert [v.note for v in said(judge, [Item("q", "a", "b")])] == ["unparsed"]


def test_reward_by_hand(tmp_path):
    head = {0: (0.3, 1.5)}
    judge = reward.make("reward", str(make_judge(tmp_path, 1, head)), flags())
    items = [Item("q", "X", "no"), Item("q", "no", "X"), Item("q", "no", "no"), Item("q", "", "X")]

    def by_hand(answer):
        text = f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        return float(expected(ids_of(text), head, 1)[0])

    found = said(judge, items)
    for item, verdict in zip(items, found, strict=True):
        assert verdict.labels == pytest.approx({"answer": by_hand(item.answer), "other": by_hand(item.other)}, abs=2e-6)
        assert verdict.score == verdict.labels["answer"]
    assert [verdict.label for verdict in found] == [True, False, None, False]


def test_nothing_is_loaded_for_nothing(head14, tmp_path, monkeypatch):
    judges = [moderation.make("moderation", str(head14), flags()),
              guard.make("guard", str(make_judge(tmp_path / "lm", 0, GUARD_HEAD)), flags()),
              reward.make("reward", str(make_judge(tmp_path / "rm", 1, {})), flags())]

    def refuse(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(local.Classifier, "load", refuse)
    monkeypatch.setattr(local.Reader, "load", refuse)
    assert [list(judge.judge([])) for judge in judges] == [[], [], []]
    with pytest.raises(AssertionError, match="loaded"):
        list(judges[0].judge(ITEMS))


def test_wrong_layouts_are_explained(head14, pico, tmp_path):
    wrong = [
        (moderation, "moderation", make_judge(tmp_path / "three", 3, {}), "needs 14 labels, has 3"),
        (moderation, "moderation", pico, "its config.json says LlamaForCausalLM"),
        (reward, "reward", head14, "needs 1 label, has 14"),
        (guard, "guard", head14, "needs a causal language model"),
        (truth_info, "truth", tmp_path / "nothing", "no such folder"),
    ]
    for module, name, folder, message in wrong:
        with pytest.raises(UserError, match=message) as raised:
            module.make(name, str(folder), flags())
        assert f"--judges {name}={folder}" in str(raised.value)


def test_a_head_that_differs_from_its_config_is_refused(head14, tmp_path):
    folder = shutil.copytree(head14, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"score.weight": tensors["score.weight"][:13].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="14 in config.json and 13 in score.weight"):
        moderation.make("moderation", str(folder), flags())
    save_file({k: v for k, v in tensors.items() if k != "score.weight"}, folder / "model.safetensors")
    with pytest.raises(UserError, match="no classification head"):
        moderation.make("moderation", str(folder), flags())
    assert len(config["id2label"]) == 14


def test_missing_weights_are_not_made_up(head14, tmp_path):
    folder = shutil.copytree(head14, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "v_proj" not in k}, folder / "model.safetensors", {"format": "pt"})
    judge = moderation.make("moderation", str(folder), flags())
    with pytest.raises(UserError, match=r"lacks 1 weights .*v_proj"):
        list(judge.judge(ITEMS))


def test_a_folder_without_tokenizer_or_safetensors(head14, tmp_path):
    folder = shutil.copytree(head14, tmp_path / "copy", ignore=shutil.ignore_patterns("token*", "special*", "chat*"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        moderation.make("moderation", str(folder), flags())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        moderation.make("moderation", str(folder), flags())


def test_version_follows_weights_prompt_threshold_length_and_dtype(head14, tmp_path, monkeypatch):
    def version(folder=head14, **more):
        return moderation.make("moderation", str(folder), flags(**more)).version

    other = make_judge(tmp_path / "other", 14, HEAD | {0: (-1.1, 0.0)}, names=NAMES)
    own = prompts_file(tmp_path, moderation={"chat": "none", "text": "{prompt}|{answer}"})
    copy = shutil.copytree(head14, tmp_path / "copy")
    assert version() == version() == version(copy) == version(judge_batch_tokens=7)
    found = {version(), version(other), version(judge_max_length=100), version(judge_compat="published"),
             version(judge_prompts=own), version(dtype="bfloat16")}
    for name in ("spiece.model", "sentencepiece.bpe.model", "spm.model"):
        before = version(copy)
        (copy / name).write_bytes(b"pieces")
        assert version(copy) != before
        (copy / name).unlink()
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"score.weight": tensors["score.weight"] * 2}, copy / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(local, "fingerprint", lambda folder: "the same body")
    assert version(copy) != version()
    monkeypatch.undo()
    monkeypatch.setattr(moderation, "THRESHOLD", 0.4)
    assert len(found | {version()}) == 7


def test_words_that_begin_alike_are_refused(tmp_path):
    folder = make_judge(tmp_path / "lm", 0, {}, chat=False)
    for words, message in (({"word": "A1", "against": "A2"}, "same token"), ({"word": "", "against": "B"}, "verdict words")):
        own = prompts_file(tmp_path, guard={"chat": "none", "text": "{prompt} {answer} ?", **words})
        with pytest.raises(UserError, match=message):
            guard.make("guard", str(folder), flags(judge_prompts=own))


def test_chat_templates_and_windows_are_checked_first(tmp_path):
    with pytest.raises(UserError, match="no chat template"):
        guard.make("guard", str(make_judge(tmp_path / "bare", 0, {}, chat=False)), flags())
    with pytest.raises(UserError, match=r"takes \d+ tokens of 20"):
        guard.make("behaviour", str(make_judge(tmp_path / "small", 0, {})), flags(judge_max_length=20))


def test_prompt_files_are_checked_all_at_once(tmp_path):
    path = prompts_file(tmp_path, gard={"chat": "none", "text": "a"}, guard={"chat": "loud", "text": "a"},
                        truth={"chat": "none"}, info={"chat": "none", "text": "a", "yess": "b"}, reward={"chat": "turns"})
    with pytest.raises(UserError) as raised:
        load_prompts(path)
    assert len(raised.value.problems) == 4
    with pytest.raises(UserError, match="no such file"):
        load_prompts(str(tmp_path / "nothing.yaml"))
    assert fill("{prompt}-{answer}", Item("{answer}", "{prompt}")) == "{answer}-{prompt}"
