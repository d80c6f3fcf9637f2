"""The openers of refusals: chosen again by the rule from training rows alone, and a user's own file with every error."""

from __future__ import annotations

import math

import pytest
import yaml

from data.sets import embedded, refusal_openers
from data.sets.refusal_openers import chosen, load
from errors import UserError
from evaluator.judges import keyword
from tests.assets_fixture import require_embedded


def test_ours_are_what_the_rule_chooses_from_training_rows():
    require_embedded()
    content = yaml.safe_load(refusal_openers.PLACE.read_text(encoding="utf-8"))
    rows = {task: [row for split in ("train", "validation") for row in embedded.records(task, split, lite=True)]
            for task in ("helpfulness", "safety", "truthfulness")}
    ours = [row.answer for row in rows["safety"] if row.id.startswith("advbench")]
    people = [row.answer for row in rows["safety"] if not row.id.startswith("advbench")]
    rated = [answer for answer in people if keyword.is_refusal(answer)]
    others = [*people, *(row.answer for task in ("helpfulness", "truthfulness") for row in rows[task]),
              *(row["assistant_response"] for row in embedded.rated_answers() if any(row["scores"]))]
    assert (len(ours), len(rated)) == (520, 92)
    base = [text for text, count in content["base_refusals"].items() for _ in range(count)]
    found = chosen({"ours": ours, "rated": rated, "base": base}, (x for x in others if not keyword.is_refusal(x)))
    assert {name: set(texts) for name, texts in found.items()} == {
        name: set(texts) for name, texts in content["sources"].items()}
    # every opener stands in one group, and every one was found somewhere
    assert set(load().texts) == {text for texts in found.values() for text in texts}
    assert len(load().groups) >= 3


def test_the_rule_by_hand():
    refusals = {"a": ["I can’t do that, sorry."] * 60 + ["No, thanks."] * 39 + ["Never in my life."], "b": ["I can't say."]}
    # "No" begins more answers than refusals, "No, thanks" none; one of a hundred is too rare
    found = chosen(refusals, ["No. It is blue."] * 50 + ["I can sing."] * 50)
    assert found == {"a": ["I can't", "No, thanks"], "b": ["I can't"]}
    # of two that begin alike the shorter one stays
    assert chosen({"a": ["Sorry."], "b": ["Sorry to say no."]}, []) == {"a": ["Sorry"], "b": ["Sorry"]}


def test_a_file_of_yours(tmp_path):
    file = tmp_path / "o.yaml"
    file.write_text("german: [Tut mir leid, Nein]\nenglish: ['No, I']\n", encoding="utf-8")
    found = load(str(file))
    assert found.texts == ("Tut mir leid", "Nein", "No, I")
    assert found.groups == {"german": ("Tut mir leid", "Nein"), "english": ("No, I",)}
    assert found.sources == {}


@pytest.mark.parametrize(("text", "says"), [
    ("- a\n", "needs groups of openers, each with at least one: GROUP: [text, ..]"),
    ("", "needs groups of openers"),
    ("a: []\n", "needs groups of openers"),
    ("a: word\n", "needs groups of openers"),
    ("a: [x\n", "no YAML"),
    ("a b: [x]\n", "group 'a b' is no name"),
    ("a: [no]\n", "False is no opener; it needs text"),
    ("a: ['x ']\n", "'x ' is no opener"),
    ("a: [x]\nb: [x]\n", "'x' stands there 2 times; keep one"),
    ("a: [I will not]\nb: [I will]\n", "'I will not' begins with 'I will'; keep one of the two")])
def test_files_that_are_none(tmp_path, text, says):
    file = tmp_path / "o.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load(str(file))
    assert says in "\n".join(raised.value.problems)
    assert all(problem.startswith(f"--openers {file}: ") for problem in raised.value.problems)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"--openers .*none.yaml: cannot be read \(No such file"):
        load(str(tmp_path / "none.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"a: [\xe4]")
    with pytest.raises(UserError, match="not UTF-8"):
        load(str(tmp_path / "latin.yaml"))


def test_the_numbers_of_the_rule_are_those_that_the_page_of_openers_tells():
    text = refusal_openers.PLACE.read_text(encoding="utf-8")
    assert "at most six words" in text
    assert refusal_openers.WORDS == 6
    assert f"at least {refusal_openers.PRECISION * 100:.0f} %" in text
    assert f"at least {math.ceil(refusal_openers.LEAST * 100)} %" in text
