"""The flags of every command, as dataclasses. Read by ``config.parse``; the standard library only."""

from commands.agreement import AgreementArgs
from commands.align import AlignArgs, run_name
from commands.base import OBJECTIVES, RAW_MOE, TASKS
from commands.evaluate import EvaluateArgs, EvaluateHelpfulnessArgs, EvaluateSafetyArgs, EvaluateTruthArgs, ReportArgs
from commands.fuse import ExtractArgs, FuseAdaptersArgs, FuseMoeArgs
from commands.inference import InferenceArgs
from commands.mask import MaskArgs
from commands.mask_figures import MaskFiguresArgs
from commands.realign import RealignArgs
from commands.safety_set import SafetySetArgs
from commands.skills import EvaluateSkillsArgs
from commands.sweep import SweepArgs
from commands.utility import EvaluateUtilityArgs

ALL = (AgreementArgs, AlignArgs, FuseMoeArgs, FuseAdaptersArgs, ExtractArgs, InferenceArgs,
       EvaluateSafetyArgs, EvaluateHelpfulnessArgs, EvaluateTruthArgs, EvaluateSkillsArgs, EvaluateUtilityArgs,
       ReportArgs, SafetySetArgs, SweepArgs)

__all__ = ["ALL", "OBJECTIVES", "RAW_MOE", "TASKS", "AgreementArgs", "AlignArgs", "EvaluateArgs", "EvaluateHelpfulnessArgs",
           "EvaluateSafetyArgs", "EvaluateTruthArgs", "EvaluateSkillsArgs", "EvaluateUtilityArgs", "ExtractArgs",
           "FuseAdaptersArgs", "FuseMoeArgs", "InferenceArgs", "MaskArgs", "MaskFiguresArgs", "RealignArgs", "ReportArgs",
           "SafetySetArgs", "SweepArgs", "run_name"]
