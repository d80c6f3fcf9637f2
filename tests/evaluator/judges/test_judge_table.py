"""The names on the command line, the table behind them, and what is wrong with a list of judges."""

import subprocess
import sys

import pytest

import config
from errors import UserError
from evaluator.judges.protocol import Item
from evaluator.judges.table import JUDGES
from flags import EvaluateHelpfulnessArgs, EvaluateSafetyArgs, EvaluateTruthArgs
from flags.judges import ASKED_BY, KNOWN


def test_names_and_table_agree():
    assert list(JUDGES) == list(KNOWN)
    for name, row in JUDGES.items():
        assert (row.question, row.needs_model) == (KNOWN[name].question, KNOWN[name].model)
        assert row.question in ASKED_BY
        assert row.definition
        assert "\n" not in row.definition


#: Judge that needs neither a model nor training -> an answer that its label is true of, and one that it is not.
RULES = {"keyword": ("I'm sorry, but I can't help with that.", "Here is the recipe."),
         "published": ("Do it. " * 100 + "I cannot say more.", "i cannot say more."),
         "coherence": ("", "Mix flour and water, and bake it for an hour.")}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_yes_and_no(name):
    judge = JUDGES[name].make(name, "", None)
    found = dict(judge.judge([Item("How?", answer) for answer in RULES[name]]))
    assert [found[place].label for place in range(2)] == [True, False]
    assert (judge.name, bool(judge.version)) == (name, True)


def parse(command, judges, *more):
    return config.parse(command, ["--task_name", "raw", "--judges", judges, *more]).args


def problems(command, judges):
    with pytest.raises(UserError) as raised:
        parse(command, judges)
    return raised.value.problems


def test_a_list_of_judges_is_parsed():
    args = parse(EvaluateSafetyArgs, " keyword, moderation=a/b ,guard=./x=y,")
    assert args.named_judges == (("keyword", ""), ("moderation", "a/b"), ("guard", "./x=y"))
    assert parse(EvaluateTruthArgs, "truth=a,info=b").named_judges == (("truth", "a"), ("info", "b"))
    assert parse(EvaluateHelpfulnessArgs, "pairwise=a,reward=b").judge_max_length == 0
    assert config.parse(EvaluateSafetyArgs, ["--task_name", "raw"]).args.named_judges == ()


def test_every_problem_comes_at_once():
    found = problems(EvaluateSafetyArgs, "moderaton=a,guard,keyword=a,truth=b,fitted,fitted,zzz")
    assert [text.split(":")[0] for text in found] == [
        "--judges moderaton", "--judges guard", "--judges keyword=a", "--judges truth", "--judges fitted", "--judges zzz"]
    said = "\n".join(found)
    here = [name for name, known in KNOWN.items() if ASKED_BY[known.question] == "evaluate_safety.py"]
    assert here[0] == "keyword"
    for words in ("did you mean moderation?", "guard=FOLDER", "takes no model", "evaluate_truth_and_info.py asks",
                  "named twice", f"known here: {', '.join(here)}"):
        assert words in said
    assert "did you mean" not in found[-1]


@pytest.mark.parametrize(("command", "judges", "says"), [
    (EvaluateTruthArgs, "moderation=a", "evaluate_safety.py"),
    (EvaluateHelpfulnessArgs, "keyword", "evaluate_safety.py"),
    (EvaluateSafetyArgs, "pairwise=a", "evaluate_helpfulness.py"),
])
def test_each_command_asks_its_own_questions(command, judges, says):
    assert says in problems(command, judges)[0]


def test_the_table_loads_no_torch():
    code = ("import sys, evaluator.judges.table, evaluator.scoring.judging; "
            "print(sorted({'torch', 'transformers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=config.ROOT, check=True)
    assert done.stdout.strip() == "[]"
