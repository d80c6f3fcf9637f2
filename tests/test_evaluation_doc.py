"""docs/evaluation.md: its commands parse, its tables are those of the code, nothing was left to fill in."""

from __future__ import annotations

import re
import shlex

import pytest

import config
import flags
from data.sets import protocols
from evaluator import evaluate_safety
from evaluator.agreement import JUDGES
from flags.judges import KNOWN

TEXT = (config.ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = {"inference.py": flags.InferenceArgs, "evaluate_safety.py": flags.EvaluateSafetyArgs,
            "evaluate_truth_and_info.py": flags.EvaluateTruthArgs,
            "evaluate_helpfulness.py": flags.EvaluateHelpfulnessArgs, "agreement.py": flags.AgreementArgs,
            "evaluate_refusal.py": flags.EvaluateRefusalArgs,
            "report.py": flags.ReportArgs, "evaluate.py": flags.EvaluateModelsArgs}
LINES = [part.strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()
         for part in line.split("#")[0].split(";") if part.strip().startswith("python ")]


@pytest.mark.parametrize("line", LINES)
def test_commands_parse(line):
    script, *flags = shlex.split(line)[1:]
    assert config.parse(COMMANDS[script.rpartition("/")[2]], flags).args is not None


def test_there_are_commands():
    assert len(LINES) >= 4


def test_the_table_of_protocols_is_the_codes():
    assert protocols.markdown() in TEXT


def test_every_attack_judge_and_score_is_explained():
    for name in flags.base.ATTACKS[1:]:
        assert f"| `{name}` |" in TEXT
    for judge in JUDGES:
        assert f"| {judge} |" in TEXT
    for judge in KNOWN.keys() - JUDGES:
        assert f"`{judge}`" in TEXT or f"`{judge}=MODEL`" in TEXT
    for name in ("REFUSAL", "SAFE", "ASR", "HARM", "INCOHERENT", "OVER", "BALANCE", "BENIGN", "HHH"):
        assert hasattr(evaluate_safety, name)
    for score in ("refusal", "safe_refusal", "published_asr", "harm_rate", "incoherent", "overrefusal", "balance",
                  "harm_false_alarms", "hhh_harmless", "refusal_auc", "refusal_at_10", "pairs_ranked"):
        assert f"| `{score}` |" in TEXT


def test_nothing_was_left_to_fill_in():
    assert not re.findall(r"\b(?:TODO|TBD|FIXME|XXX|[A-Z]+_[A-Z]+)\b", TEXT)


def test_quotes_are_short():
    assert all(len(quote) < 160 for quote in re.findall(r'"([^"|`]*)"', TEXT.split("## Where they fail")[1].split("##")[0]))
