"""Templates: Alpaca's published text, the tokenizer's own chat template, braces that survive."""

from __future__ import annotations

import hashlib

import pytest
from pico import pico_tokenizer

from data import prompts
from data.prompts import ALPACA_HASHES, ALPACA_NO_INPUT, ALPACA_WITH_INPUT, END_MARKER, check_alpaca, template
from errors import UserError

HASHES = {
    "with input": (224, "28811e9850d9511bab334d167a03a8a37614535fdb28d645492efac8e9951c0f"),
    "without input": (152, "35101bc36d10997c7d926d8f21f7d173aec6523f3a57d78821b944a89925cdca"),
}
TRICKY = ("{input}", "{instruction}", "a {} b {0} {{x}}", "%s %(a)s", "### Response:", "back\\slash \\1", "", "ü\n\n漢")


@pytest.fixture(scope="module")
def tokenizer():
    return pico_tokenizer()


@pytest.mark.parametrize("name", HASHES)
def test_alpaca_text_is_the_published_one(name):
    text, recorded = ALPACA_HASHES[name]
    length, want = HASHES[name]
    assert len(text) == length
    assert hashlib.sha256(text.encode()).hexdigest() == want == recorded
    check_alpaca(ALPACA_HASHES)


@pytest.mark.parametrize("name", HASHES)
def test_a_changed_alpaca_template_is_named(name, tokenizer, monkeypatch):
    text, want = ALPACA_HASHES[name]
    changed = ALPACA_HASHES | {name: (text + " ", want)}
    monkeypatch.setattr(prompts, "ALPACA_HASHES", changed)
    with pytest.raises(UserError) as caught:
        template("alpaca", tokenizer)
    (problem,) = caught.value.problems
    assert f"template {name}:" in problem
    assert "data/prompts.py" in problem


def test_every_changed_template_is_named_at_once():
    with pytest.raises(UserError) as caught:
        check_alpaca({name: ("x", want) for name, (_, want) in ALPACA_HASHES.items()})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("prompt", TRICKY)
@pytest.mark.parametrize("extra", TRICKY)
def test_user_text_survives_alpaca(tokenizer, prompt, extra):
    text = template("alpaca", tokenizer).render(prompt, extra)
    form = ALPACA_WITH_INPUT if extra else ALPACA_NO_INPUT
    head, rest = form.split("{instruction}")
    middle, cue = rest.split("{input}") if extra else ("", rest)
    assert text == head + prompt + middle + extra + cue
    assert text.endswith("### Response:")


def test_alpaca_ends_answers_with_its_marker(tokenizer):
    form = template("alpaca", tokenizer)
    assert form.end == END_MARKER == "###END"
    assert form.answer("yes") == "yes###END"
    assert form.special_tokens


@pytest.mark.parametrize("prompt", TRICKY)
@pytest.mark.parametrize("extra", ["", "more {text}"])
def test_chat_is_the_tokenizers_own_template(tokenizer, prompt, extra):
    content = f"{prompt}\n\n{extra}" if extra else prompt
    want = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    form = template("chat", tokenizer)
    assert form.render(prompt, extra) == want
    assert content in want
    assert (form.end, form.special_tokens) == ("", False)


def test_chat_adds_no_second_start_token(tokenizer):
    text = template("chat", tokenizer).render("Hi", "")
    want = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, add_generation_prompt=True)
    want = want["input_ids"] if hasattr(want, "keys") else want
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(want)


def test_wizardlm_is_the_text_a_blank_line_and_the_marker(tokenizer):
    form = template("wizardlm", tokenizer)
    assert form.render("Add {these}.", "") == "Add {these}.\n\n### Response:"
    assert form.render("Add {these}.", "2, 3") == "Add {these}.\n2, 3\n\n### Response:"
    assert (form.end, form.special_tokens) == ("", True)


@pytest.mark.parametrize("value", [None, ""])
def test_a_tokenizer_without_chat_template_is_a_user_error(value):
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = value
    with pytest.raises(UserError, match="--template alpaca"):
        template("chat", tokenizer)
    assert template("alpaca", tokenizer).name == "alpaca"


GEMMA = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}")
SILENT = "{% for m in messages if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.mark.parametrize("written", [GEMMA, SILENT])
def test_a_template_without_a_system_turn_gets_its_text_with_the_users(written):
    from pico import pico_tokenizer

    tokenizer = pico_tokenizer()
    tokenizer.chat_template = written
    shape = template("chat", tokenizer)
    text = shape.render("Say hi", "to me", "Be brief.")
    assert text == shape.render("Be brief.\n\nSay hi\n\nto me", "")
    assert "Be brief.\n\nSay hi\n\nto me" in text
    assert "Be brief" not in shape.render("Say hi", "")


def test_a_template_that_refuses_every_turn_is_refused_by_name():
    from pico import pico_tokenizer

    tokenizer = pico_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('tools only') }}"
    with pytest.raises(UserError, match=r"--template chat: .*refuses a single user turn \(tools only\)"):
        template("chat", tokenizer).render("Say hi", "")


def chatting(tokenizer, text):
    tokenizer.chat_template = text
    return template("chat", tokenizer).render("Say hi", "")


def test_the_day_is_one_day_for_every_run():
    tokenizer = pico_tokenizer()
    text = ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {% endif %}"
            "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert chatting(tokenizer, text) == "26 Jul 2024 Say hi"
    assert chatting(tokenizer, {"default": text, "tools": "x"}) == "26 Jul 2024 Say hi"


@pytest.mark.parametrize(("text", "says"), [
    ("{% for m in messages %}{{ m['content'] + 5 }}{% endfor %}", "refuses a single user turn"),
    ({"rag": "x", "tools": "y"}, "no default"),
    ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "leaves the user turn out"),
    ("{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}Assistant:", "leaves the user turn"),
])
def test_templates_that_raise_or_lose_the_question(text, says):
    with pytest.raises(UserError, match=says):
        chatting(pico_tokenizer(), text)
