"""No flag is accepted that the code behind its command does not read: found from the source, function by function.

From a command's entry on, every function, class and table that is named is followed into its own module, and each
``args.FLAG`` on the way counts as read.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import align_basemodel
import flags
from config import ROOT
from flags.base import WITHOUT_EFFECT
from flags.judges import JudgeFlags
from models import fuse

#: What a command's dataclass is called in the code that reads it.
#: ``card``: the group of flags that workflow/estimate.py reckons with.
ARGS = ("args", "flags", "self.flags", "self.args", "source.args", "self.source.args", "card")
#: Judges are made through names in strings (evaluator/judges/table.py).
JUDGES = tuple(f"evaluator.judges.{name}:make"
               for name in ("api", "guard", "moderation", "pairwise", "reward", "truth_info"))
COMMANDS = {
    flags.FuseMoeArgs: "models.llama_moe:main", flags.InferenceArgs: "inference:main", flags.SweepArgs: "scripts.sweep:main",
    flags.EvaluateSafetyArgs: "evaluator.evaluate_safety:main", flags.ReportArgs: "evaluator.report:main",
    flags.EvaluateHelpfulnessArgs: "evaluator.evaluate_helpfulness:main",
    flags.EvaluateRefusalArgs: "evaluator.evaluate_refusal:main",
    flags.EvaluateTruthArgs: "evaluator.evaluate_truth_and_info:main",
    flags.EvaluateSkillsArgs: "evaluator.evaluate_skills:main", flags.EvaluateUtilityArgs: "evaluator.evaluate_utility:main",
    flags.AgreementArgs: "evaluator.agreement:main", flags.AttackTableArgs: "evaluator.attack_table:main",
    flags.EqualUtilityArgs: "evaluator.equal_utility:main", flags.MaskFiguresArgs: "evaluator.mask_figures:main",
    flags.EvaluateModelsArgs: "evaluator.evaluate:main", flags.ListArgs: "evaluator.registry:list_runs",
    flags.ShowArgs: "evaluator.registry:show", flags.CompareArgs: "evaluator.registry:compare",
    flags.ExportScoresArgs: "evaluator.registry:export",
    flags.DurabilityArgs: "evaluator.durability:main",
    flags.LeaderboardArgs: "workflow.leaderboard:main", flags.PaperTablesArgs: "workflow.paper_tables:main",
    flags.PaperTableArgs: "evaluator.paper_table:main",
    flags.SafetySetArgs: "data.safety_sets:main", **{kind: entry for kind, entry in fuse.COMMANDS.values()},
}


def file_of(module: str) -> Path | None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path if path.is_file() else None


@cache
def definitions(module: str) -> tuple[dict[str, ast.AST], dict[str, tuple[str, str]]]:
    """What a module defines by name, and what it imports from the repository: name -> (module, name there or "")."""
    tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
    own: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own[node.name] = node
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                own[target.id] = node
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                place = (inner, "") if file_of(inner) else (node.module, alias.name)
                # a plan reads flags of every command; what it alone reads decides nothing
                if file_of(place[0]) and not place[0].startswith(("flags", "models.footprint")):
                    imports[alias.asname or alias.name] = place
        elif isinstance(node, ast.Import):
            imports |= {alias.name: (alias.name, "") for alias in node.names if file_of(alias.name)}
    return own, imports


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def reads(*entries: str) -> set[str]:
    """Names of the flags, and of the properties made of them, that the code from these entries on reads."""
    found: set[str] = set()
    done: set[tuple[str, str]] = set()
    waiting = [tuple(entry.split(":")) for entry in entries]
    while waiting:
        module, name = waiting.pop()
        own, imports = definitions(module)
        if (module, name) in done or name not in own:
            continue
        done.add((module, name))
        nodes = list(ast.walk(own[name]))
        by_name = False
        for node in nodes:
            if isinstance(node, ast.Name):
                waiting.append(imports.get(node.id, (module, node.id)))
            elif isinstance(node, ast.Attribute):
                place = dotted(node.value)
                if place in ARGS:
                    found.add(node.attr)
                elif place in imports and not imports[place][1]:
                    waiting.append((imports[place][0], node.attr))
            elif isinstance(node, ast.Call) and dotted(node.func) == "getattr" and dotted(node.args[0]) in ARGS:
                by_name |= not isinstance(node.args[1], ast.Constant)
                found.add(getattr(node.args[1], "value", ""))
        if by_name:  # getattr(args, name): the names stand in a table beside it
            for table in (own[node.id] for node in nodes if isinstance(node, ast.Name) and node.id in own):
                found |= {n.value for n in ast.walk(table) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


def with_properties(kind: type, names: set[str]) -> set[str]:
    """The names, and what the properties and methods among them read of the flags themselves."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for cls in kind.__mro__:
            member = vars(cls).get(name)
            code = member.fget if isinstance(member, property) else member if inspect.isfunction(member) else None
            if code:
                tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
                waiting += [node.attr for node in ast.walk(tree)
                            if isinstance(node, ast.Attribute) and dotted(node.value) == "self"]
    return found


@pytest.mark.parametrize("kind", flags.TRAINED.values(), ids=lambda kind: kind.__name__)
def test_every_flag_of_an_objective_is_read_by_its_training(kind):
    read = with_properties(kind, reads("align_basemodel:main", f"{align_basemodel.TRAINERS[kind]}:train"))
    assert {item.name for item in fields(kind)} - read - set(flags.AlignArgs.deciding) == set()


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_flag_of_a_command_is_read_or_says_that_it_has_no_effect(kind):
    judges = JUDGES if issubclass(kind, JudgeFlags) else ()
    read = with_properties(kind, reads(COMMANDS[kind], *judges))
    unread = {item.name for item in fields(kind)} - read
    assert unread <= WITHOUT_EFFECT.get(kind.__name__, {}).keys()


def test_every_command_is_looked_at():
    assert {*COMMANDS, *flags.TRAINED.values(), flags.AlignArgs} == set(flags.COMMANDS)


def test_a_flag_that_nobody_reads_is_found():
    read = reads("align_basemodel:main", "training.dpo:train")
    assert {"beta", "learning_rate", "lora_r", "threads", "results"} <= read
    # a preference pair has neither: what the trainings of other objectives read does not count
    assert not read & {"mixing", "split_mode", "extra_data", "gate_tokens", "adapters"}
