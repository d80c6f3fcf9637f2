"""Flags of API judges: every problem before any work, and no secret in any message."""

from __future__ import annotations

import pytest

import config
from errors import UserError
from flags import EvaluateTruthArgs
from flags.judge_flags import ApiFlags, is_loopback

KEY = "sk-Secret0123456789"
LOCAL = {"judge_model": "m", "judge_base_url": "http://127.0.0.1:8000/v1"}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def problems(**flags):
    return ApiFlags(**flags).api_problems(["keyword", "api-harm"])


def test_only_api_judges_need_an_endpoint():
    assert ApiFlags().api_problems(["keyword", "fitted"]) == []
    assert problems(**LOCAL) == []


def test_the_variable_is_named(monkeypatch):
    said = problems(judge_model="m")
    assert said == ["OPENAI_API_KEY: api-harm asks https://api.openai.com/v1 and needs its key in this environment "
                    "variable; export it, or name another with --judge_key_variable"]
    monkeypatch.setenv("OTHER_KEY", KEY)
    assert problems(judge_model="m", judge_key_variable="OTHER_KEY") == []
    monkeypatch.setenv("OTHER_KEY", "  ")
    assert "OTHER_KEY" in problems(judge_model="m", judge_key_variable="OTHER_KEY")[0]


@pytest.mark.parametrize("flags", [
    {"judge_key_variable": KEY}, {"judge_base_url": f"https://user:{KEY}@host/v1"},
    {"judge_base_url": f"https://host/v1?key={KEY}"}, {"judge_base_url": f"https://host/v1#{KEY}"},
    {"judge_base_url": f"ftp://{KEY}"}, {"judge_base_url": f"https://host:{KEY}/v1"},
])
def test_a_key_in_a_flag_is_refused_and_not_repeated(flags):
    said = problems(**(LOCAL | flags))
    assert len(said) == 1
    assert KEY not in said[0]


@pytest.mark.parametrize("key", ["sk-öl", "sk-a\nb", "sk-\x00"])
def test_a_key_that_cannot_be_sent(monkeypatch, key):
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    said = problems(judge_model="m")
    assert said == ["OPENAI_API_KEY: holds characters that no key has (not printable ASCII)"]


def test_all_problems_at_once():
    said = problems(judge_prices="1", max_cost=2.0, judge_concurrency=9999)
    assert [text.split(":")[0].split(" ")[0] for text in said] == [
        "--judge_model", "OPENAI_API_KEY", "--judge_concurrency", "--judge_prices"]
    assert "--max_cost 2: needs --judge_prices" in problems(**LOCAL, max_cost=2.0)[0]


@pytest.mark.parametrize(("text", "prices"), [
    ("2.5,10", (2.5, 10)), (" 0 , 0 ", (0, 0)), ("", None), ("1", None), ("1,2,3", None), ("a,b", None), ("-1,2", None),
    ("nan,1", None), ("inf,1", None),
])
def test_prices(text, prices):
    assert ApiFlags(judge_prices=text).prices == prices


@pytest.mark.parametrize(("url", "local"), [
    ("http://127.0.0.1:1/v1", True), ("http://127.9.9.9", True), ("http://[::1]:8000/v1", True),
    ("http://localhost/v1", True),
    ("http://127.0.0.1.example.com/v1", False), ("https://localhost.example.com", False), ("http://10.0.0.1/v1", False),
    ("", False), ("http://[", False),
])
def test_loopback(url, local):
    assert is_loopback(url) is local


def test_commands_take_the_flags():
    words = ["--task_name", "raw", "--judges", "api-truth", "--judge_model", "m", "--max_cost", "1"]
    with pytest.raises(UserError) as found:
        config.parse(EvaluateTruthArgs, words)
    assert [text.split(":")[0] for text in found.value.problems] == ["OPENAI_API_KEY", "--max_cost 1"]
    args = config.parse(EvaluateTruthArgs, [*words, "--judge_prices", "1,2", "--judge_base_url", "http://[::1]:1/v1"]).args
    assert (args.prices, args.max_cost, args.judge_is_local) == ((1, 2), 1, True)
