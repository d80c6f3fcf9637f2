"""The parser of judges' replies: what it reads, what it refuses, and that no text breaks it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluator.judges.api import rules
from evaluator.judges.api_parser import parse

HARM, ORDER = rules().judges["api-harm"], rules().judges["api-preference"]
CLASSES, YES_NO = rules().judges["api-overrefusal"], rules().judges["api-truth"]


def read(question, text):
    found = parse(text, question.fields, question.verdicts)
    return found and found[0]


@pytest.mark.parametrize(("text", "verdict"), [
    ('{"reason": "bad", "score": 4}', "4"),
    ('```json\n{"score": 4, "reason": "bad"}\n```', "4"),
    ('Here it is:\n{"reason": "a {brace} in it", "score": "4"}\nGood day.', "4"),
    ('{"reason": "floats", "score": 4.0}', "4"),
    ('{"Score": 4}', "4"),
    ('{"result": {"score": 4}}', "4"),
    ('{"reason": "an "unescaped" quote", "score": 4}', "4"),
    ('{"reason": "cut before its end", "score": 4', "4"),
    ("Score: 4", "4"),
    ("**Score:** 4", "4"),
    ("score = 4/5", "4"),
    ("Score (1-5): 4 out of 5", "4"),
    ("#thereason: grave\n#thescore: 4.", "4"),
    ("The reply is bad.\nFinal score: [4]", "4"),
    ("The rating is 4, since it helps.", "4"),
    ("Score:\n4", "4"),
    ("Score: 4 - it helps", "4"),
    ("4", "4"),
    (" **4**. ", "4"),
    ("４", "4"),
    ("<think>Score: 1? no.</think>Score: 4", "4"),
    ('{"score": 4}\n{"score": 4}', "4"),
    ('{"score": 1}\n{"score": 4}', None),
    ("Score: 1 would be too low. Score: 4", "4"),
    ("Score: 1. No, score: 4", None),
    ('{"score": 6}', None),
    ('{"score": 0}', None),
    ('{"score": 4.5}', None),
    ("Score: 4.5", None),
    ("Score: 4-5", None),
    ("Score: 4 or 5", None),
    ("Score: 10/10", None),
    ('{"score": true}', None),
    ('{"score": [4]}', None),
    ('{"score": null}', None),
    ('{"score": NaN}', None),
    ("There are 4 problems here.", None),
    ("", None),
    ("{" * 3000, None),
    ('{"a":' * 3000 + "1" + "}" * 3000, None),
])
def test_scores(text, verdict):
    assert read(HARM, text) == verdict


@pytest.mark.parametrize(("text", "verdict"), [
    ('{"verdict": "A"}', "A"), ('{"verdict": "reply b"}', "B"), ("Verdict: A", "A"), ("[[B]]", "B"), ("Tie.", "tie"),
    ("Verdict: a tie", "tie"), ('{"verdict": "tie", "reason": "both A and B refuse"}', "tie"), ("Winner: Reply A!", "A"),
    ("Verdict: a slight lead for B", None), ("Verdict: A or B", None), ("Verdict: A and B are equal", None),
    ("A is fine and B is worse.", None), ('{"verdict": "A"} {"verdict": "B"}', None),
])
def test_orders(text, verdict):
    assert read(ORDER, text) == verdict


@pytest.mark.parametrize(("text", "verdict"), [
    ('{"verdict": "full_compliance"}', "full_compliance"), ("Verdict: Full Refusal", "full_refusal"),
    ("class: **partial_refusal**", "partial_refusal"), ("Full compliance.", "full_compliance"),
    ('{"verdict": "no refusal"}', None), ("It does not refuse.", None), ("not a full refusal", None),
])
def test_classes(text, verdict):
    assert read(CLASSES, text) == verdict


@pytest.mark.parametrize(("text", "verdict"), [
    ('{"verdict": true}', "yes"), ('{"verdict": "No", "reason": "Score: yes"}', "no"), ("Yes.", "yes"),
    ("Verdict: not truthful", "no"), ("Truthful: no", "no"), ("yes and no", None), ("I say yes", None),
])
def test_yes_no(text, verdict):
    assert read(YES_NO, text) == verdict


def test_the_reason_comes_along():
    assert parse('{"reason": "It declines.", "score": 1}', HARM.fields, HARM.verdicts) == ("1", "It declines.")
    assert parse("It declines.\nScore: 1", HARM.fields, HARM.verdicts) == ("1", "It declines.\nScore: 1")


QUESTIONS = st.sampled_from(list(rules().judges.values()))


@settings(max_examples=300, deadline=None)
@given(QUESTIONS, st.one_of(st.text(), st.text('{}[]":,.\n 12345ABtieyesno_score:verdict', max_size=200)))
def test_no_text_breaks_it(question, text):
    found = parse(text, question.fields, question.verdicts)
    assert found is None or (found[0] in question.verdicts and isinstance(found[1], str))


@settings(max_examples=200, deadline=None)
@given(QUESTIONS, st.data())
def test_every_phrase_in_every_form_is_read_back(question, data):
    verdict = data.draw(st.sampled_from(sorted(question.verdicts)))
    phrase = data.draw(st.sampled_from(question.verdicts[verdict]))
    reason = data.draw(st.text(max_size=80))
    around = data.draw(st.sampled_from(["", "Well.\n", "My thoughts, in short:\n"]))
    one = json.dumps({"reason": reason, question.fields[0]: phrase}, ensure_ascii=data.draw(st.booleans()))
    for text in (one, f"{around}```json\n{one}\n```", f"{around}{question.fields[0].title()}: {phrase}", phrase):
        assert read(question, text) == verdict
    assert parse(one, question.fields, question.verdicts) == (verdict, reason)
