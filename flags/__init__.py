"""The flags of every command, as dataclasses made of groups. Read by ``config.parse``; the standard library only.

``base`` has what a group and a command are, and the groups that commands of every kind read; ``data``, ``optimiser``,
``lora``, ``preferences``, ``moe``, ``mask``, ``soup``, ``judges`` and ``judge_flags`` have groups of one matter; every other
file has a command.
"""

from flags.agreement import AgreementArgs
from flags.align import TRAINED, AlignArgs, DpoArgs, ExpertArgs, FusedMoeArgs, MaskArgs, SearchArgs, SoupArgs, run_name
from flags.attack_table import AttackTableArgs
from flags.base import OBJECTIVES, RAW_MOE, TASKS, declare
from flags.equal_utility import EqualUtilityArgs
from flags.evaluate import (
    EvaluateArgs,
    EvaluateHelpfulnessArgs,
    EvaluateSafetyArgs,
    EvaluateTruthArgs,
    ReportArgs,
    ScoredAnswersArgs,
)
from flags.evaluate_models import EvaluateModelsArgs
from flags.export import ExportArgs, ImportArgs
from flags.fuse import ExtractArgs, FuseAdaptersArgs, FuseMoeArgs
from flags.inference import InferenceArgs
from flags.mask_figures import MaskFiguresArgs
from flags.merge import MergeArgs
from flags.realign import RealignArgs
from flags.registry import CompareArgs, ExportScoresArgs, ListArgs, ShowArgs
from flags.safety_set import SafetySetArgs
from flags.skills import EvaluateSkillsArgs
from flags.sweep import SweepArgs
from flags.utility import EvaluateUtilityArgs

ALL = (AgreementArgs, AlignArgs, FuseMoeArgs, FuseAdaptersArgs, ExtractArgs, InferenceArgs,
       EvaluateSafetyArgs, EvaluateHelpfulnessArgs, EvaluateTruthArgs, EvaluateSkillsArgs, EvaluateUtilityArgs,
       ReportArgs, SafetySetArgs, SweepArgs)
#: Every command, those included that do nothing without a flag of their own, and every objective of align_basemodel.py.
COMMANDS = (*ALL, *TRAINED.values(), AttackTableArgs, CompareArgs, EqualUtilityArgs, EvaluateModelsArgs, ExportArgs,
            ExportScoresArgs, ImportArgs, ListArgs, MaskFiguresArgs, MergeArgs, RealignArgs, ShowArgs)
declare(COMMANDS)

__all__ = ["ALL", "COMMANDS", "OBJECTIVES", "RAW_MOE", "TASKS", "TRAINED", "AgreementArgs", "AlignArgs", "AttackTableArgs",
           "CompareArgs", "DpoArgs", "EqualUtilityArgs", "EvaluateArgs", "EvaluateHelpfulnessArgs", "EvaluateModelsArgs",
           "EvaluateSafetyArgs", "EvaluateSkillsArgs", "EvaluateTruthArgs", "EvaluateUtilityArgs", "ExpertArgs",
           "ExportArgs", "ExportScoresArgs", "ExtractArgs", "FuseAdaptersArgs", "FuseMoeArgs", "FusedMoeArgs", "ImportArgs",
           "InferenceArgs", "ListArgs", "MaskArgs", "MaskFiguresArgs", "MergeArgs", "RealignArgs", "ReportArgs",
           "SafetySetArgs", "ScoredAnswersArgs", "SearchArgs", "ShowArgs", "SoupArgs", "SweepArgs", "run_name"]
