"""The flags of every command, as dataclasses made of groups. Read by ``config.parse``; the standard library only.

``base`` has what a group and a command are, and the groups that commands of every kind read; ``data``, ``optimiser``,
``lora``, ``preferences``, ``moe``, ``mask``, ``soup``, ``judges`` and ``judge_flags`` have groups of one matter; every other
file has a command.

A name is imported when it is asked for: classes of flags take longer to make than Python to start, and --help of a command
needs its own alone.
"""

from __future__ import annotations

import importlib
from typing import Any

#: File -> what this package has of it.
_FILES: dict[str, tuple[str, ...]] = {
    "agreement": ("AgreementArgs",),
    "align": ("TRAINED", "AlignArgs", "DpoArgs", "ExpertArgs", "FusedMoeArgs", "MaskArgs", "SearchArgs", "SoupArgs",
              "run_name"),
    "attack_table": ("AttackTableArgs",),
    "base": ("OBJECTIVES", "RAW_MOE", "TASKS"),
    "durability": ("DurabilityArgs",),
    "equal_utility": ("EqualUtilityArgs",),
    "evaluate": ("EvaluateArgs", "EvaluateHelpfulnessArgs", "EvaluateSafetyArgs", "EvaluateTruthArgs", "ReportArgs",
                 "ScoredAnswersArgs"),
    "evaluate_models": ("EvaluateModelsArgs",),
    "export": ("ExportArgs", "GatherArgs", "ImportArgs"),
    "fuse": ("ExtractArgs", "FuseAdaptersArgs", "FuseMoeArgs"),
    "inference": ("InferenceArgs",),
    "leaderboard": ("LeaderboardArgs",),
    "mask_figures": ("MaskFiguresArgs",),
    "paper_tables": ("PaperTableArgs", "PaperTablesArgs"),
    "merge": ("MergeArgs",),
    "realign": ("RealignArgs",),
    "refusal": ("EvaluateRefusalArgs",),
    "registry": ("CompareArgs", "ExportScoresArgs", "ListArgs", "ShowArgs"),
    "safety_set": ("SafetySetArgs",),
    "skills": ("EvaluateSkillsArgs",),
    "sweep": ("SweepArgs",),
    "utility": ("EvaluateUtilityArgs",),
}
_PLACES = {name: file for file, names in _FILES.items() for name in names}
_ALL = ("AgreementArgs", "AlignArgs", "FuseMoeArgs", "FuseAdaptersArgs", "ExtractArgs", "InferenceArgs",
        "EvaluateSafetyArgs", "EvaluateRefusalArgs", "EvaluateHelpfulnessArgs", "EvaluateTruthArgs", "EvaluateSkillsArgs",
        "EvaluateUtilityArgs", "ReportArgs", "SafetySetArgs", "SweepArgs")
#: Commands that do nothing without a flag of their own.
_MORE = ("AttackTableArgs", "CompareArgs", "DurabilityArgs", "EqualUtilityArgs", "EvaluateModelsArgs", "ExportArgs",
         "ExportScoresArgs", "GatherArgs", "ImportArgs", "LeaderboardArgs", "ListArgs", "MaskFiguresArgs", "MergeArgs",
         "PaperTableArgs", "PaperTablesArgs", "RealignArgs", "ShowArgs")

__all__ = ["ALL", "COMMANDS", *_PLACES]  # noqa: PLE0604, F822 - names of __getattr__


def __getattr__(name: str) -> Any:
    """A name of ``__all__``; ALL: the commands that do something without a flag; COMMANDS: those, the others, and every
    objective of align_basemodel.py."""
    if name in _PLACES:
        value = getattr(importlib.import_module(f"flags.{_PLACES[name]}"), name)
    elif name == "ALL":
        value = tuple(__getattr__(command) for command in _ALL)
    elif name == "COMMANDS":
        value = (*__getattr__("ALL"), *__getattr__("TRAINED").values(), *(__getattr__(command) for command in _MORE))
    else:
        raise AttributeError(f"module 'flags' has no attribute {name!r}")
    globals()[name] = value
    return value
