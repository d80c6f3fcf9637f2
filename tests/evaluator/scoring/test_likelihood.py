
import pytest
import torch
from pico_families import make_family

from data.prompts import template
from errors import UserError
from evaluator.scoring.likelihood import Tree, answer_logprobs
from models.base.loading import load_base, load_tokenizer
from models.runs import Loaded


@pytest.fixture(scope="module")
def loaded(pico):
    model, tokenizer = load_base(pico, torch.float32, torch.device("cpu")), load_tokenizer(pico)
    return Loaded(model, tokenizer, template("chat", tokenizer), "pico", torch.device("cpu"))


def naive(loaded, prompt, answer, end=False):
    """One forward pass per answer, nothing shared."""
    front = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    back = loaded.tokenizer(answer, add_special_tokens=False)["input_ids"] + [loaded.tokenizer.eos_token_id] * end
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([front + back])).logits[0].log_softmax(-1)
    at = range(len(front) - 1, len(front) + len(back) - 1)
    return sum(float(logits[i, token]) for i, token in zip(at, back, strict=True)), len(back)


def items(loaded):
    questions = ("What is the capital of France?", "What is bread?", "Why?", "What is the capital of France")
    answers = ("Paris.", "Paris, a city on the Seine.", "Paris, a city.", "", "No.", "Mix flour — and wait “long”.")
    prompts = [loaded.template.render(question, "") for question in questions]
    # interleaved on purpose: items of one prompt need not be neighbours
    return [(prompt, answer) for answer in answers for prompt in prompts]


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 4096])
@pytest.mark.parametrize("end", [False, True])
def test_shared_prefixes_equal_one_at_a_time(loaded, batch_tokens, end):
    found = answer_logprobs(loaded, items(loaded), batch_tokens, end=end)
    for (prompt, answer), (total, n) in zip(items(loaded), found, strict=True):
        want, tokens = naive(loaded, prompt, answer, end)
        assert n == tokens
        assert total == pytest.approx(want, abs=1e-4)


def test_empty_answer_has_no_tokens(loaded):
    assert answer_logprobs(loaded, [("Why?", "")]) == [(0.0, 0)]
    assert answer_logprobs(loaded, []) == []


def test_one_pass_for_everything_that_fits(loaded, monkeypatch):
    sizes = []
    inner = loaded.model.model.forward

    def spy(*args, **kwargs):
        sizes.append(kwargs["input_ids"].shape[1])
        return inner(*args, **kwargs)

    monkeypatch.setattr(loaded.model.model, "forward", spy)
    answer_logprobs(loaded, items(loaded), 4096)
    assert len(sizes) == 1
    naive_tokens = sum(len(loaded.tokenizer(p + a)["input_ids"]) for p, a in items(loaded))
    assert sizes[0] < naive_tokens / 3


def test_start_token_of_the_tokenizer_is_used_when_the_template_has_none(loaded):
    alpaca = template("alpaca", loaded.tokenizer)
    assert alpaca.special_tokens
    seen = []

    class Spy:
        eos_token, eos_token_id = loaded.tokenizer.eos_token, loaded.tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens):
            seen.append((text, add_special_tokens))
            return loaded.tokenizer(text, add_special_tokens=add_special_tokens)

    answer_logprobs(Loaded(loaded.model, Spy(), alpaca, "pico", loaded.device), [("Why?", "Because.")])
    assert seen == [(["Why?"], True), ("Because.", False)]


def test_prompt_without_tokens_is_refused(loaded):
    with pytest.raises(ValueError, match="prompt without tokens"):
        answer_logprobs(loaded, [("", "Yes.")])


def test_bfloat16_stays_close(loaded, pico):
    half = Loaded(load_base(pico, torch.bfloat16, loaded.device), loaded.tokenizer, loaded.template, "x", loaded.device)
    for (a, n), (b, _) in zip(answer_logprobs(loaded, items(loaded)), answer_logprobs(half, items(loaded)), strict=True):
        assert a == pytest.approx(b, abs=0.05 * max(n, 1))


def test_tree_merges_prefixes_and_masks_strangers():
    tree = Tree()
    assert tree.new_nodes([1, 2, 3]) == 3
    assert tree.add([1, 2, 3]) == [0, 1, 2]
    assert tree.new_nodes([1, 2, 4]) == 1
    assert tree.add([1, 2, 4]) == [0, 1, 3]
    assert tree.add([2, 4]) == [4, 5]
    assert tree.depths == [0, 1, 2, 2, 0, 1]
    assert tree.mask().int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1],
    ]

def old_sums(loaded, rows):
    """The formula of one pass as it stood before families had windows and rules, for a plain Llama."""
    tree, paths = Tree(), []
    for prompt, answer in rows:
        paths.append(tree.add([*prompt, *answer[:-1]])[len(prompt) - 1 :])
    model, seen = loaded.model, tree.mask()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    hidden = model.model(input_ids=torch.tensor([tree.tokens]), attention_mask=mask[None, None],
                         position_ids=torch.tensor([tree.depths]), use_cache=False).last_hidden_state[0]
    where = torch.tensor([node for path in paths for node in path])
    nodes, slot = where.unique(return_inverse=True)
    logits = model.lm_head(hidden[nodes]).float()
    targets = torch.tensor([token for _, answer in rows for token in answer])
    found = logits[slot, targets] - logits.logsumexp(-1)[slot]
    return [float(part.double().sum()) for part in found.split([len(answer) for _, answer in rows])]


def test_a_plain_model_is_bitwise_what_it_was(loaded):
    """The embedded default's tables."""
    found = [total for total, n in answer_logprobs(loaded, items(loaded), 4096) if n]
    texts = [(p, a) for p, a in items(loaded) if a]
    rows = [tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in texts]
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    with torch.inference_mode():
        old = old_sums(loaded, [rows[i] for i in order])
    assert [found[i] for i in order] == old


def of_family(kind, tmp_path, **settings):
    folder = make_family(tmp_path / kind, kind, **settings)
    model, tokenizer = load_base(folder, torch.float32, torch.device("cpu")), load_tokenizer(folder)
    return Loaded(model, tokenizer, template("chat", tokenizer), kind, torch.device("cpu"))


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}


@pytest.mark.parametrize(("kind", "settings"), [
    ("gemma2", {}), ("gemma3_text", {}), ("mistral", {}), ("phi3", {}), ("cohere2", {}), ("qwen2", {}), ("granite", {}),
    ("phi3", {"rope_parameters": LONGROPE}), ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                                                            "rope_theta": 10000.0},
                                                        "max_position_embeddings": 24}),
    ("mixtral", {}), ("mixtral", {"sliding_window": None}), ("qwen3_moe", {}), ("gpt2", {}), ("gpt_neox", {}), ("opt", {}),
])
@pytest.mark.parametrize("batch_tokens", [40, 4096])
def test_every_row_scores_what_it_does_alone(kind, settings, batch_tokens, tmp_path):
    """Windows, caps and scales, positions that are learned, RoPE that depends on a row's length."""
    loaded = of_family(kind, tmp_path, **settings)
    found = answer_logprobs(loaded, items(loaded), batch_tokens, end=True)
    for (prompt, answer), (total, n) in zip(items(loaded), found, strict=True):
        # dynamic RoPE remembers the longest row; a short one makes it forget
        loaded.model(torch.tensor([[1]]))
        want, tokens = naive(loaded, prompt, answer, end=True)
        assert n == tokens
        assert total == pytest.approx(want, abs=1e-4)


def test_an_exported_mixture_reads_a_prompt_once(tmp_path):
    """Twenty openers of a prompt in one pass, and not twenty passes."""
    for kind in ("mixtral", "qwen3_moe"):
        loaded = of_family(kind, tmp_path)
        passes = []
        loaded.model.model.register_forward_hook(lambda *_, to=passes: to.append(1))
        prompt = loaded.template.render("How do I sharpen a knife?", "")
        answer_logprobs(loaded, [(prompt, f"I cannot help with {i}.") for i in range(20)], 4096)
        assert len(passes) == 1


def test_rows_beyond_a_table_of_positions_are_refused(tmp_path):
    loaded = of_family("gpt2", tmp_path, max_position_embeddings=24)
    with pytest.raises(UserError, match="have [0-9]+ tokens, but model type 'gpt2' has 24 positions; use a model with more"):
        answer_logprobs(loaded, [(loaded.template.render("What is the capital of France, I wonder?", ""), "Paris.")])
