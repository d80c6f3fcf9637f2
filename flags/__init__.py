"""The flags of every command, as dataclasses. Read by ``config.parse``; the standard library only."""

from flags.agreement import AgreementArgs
from flags.align import AlignArgs, run_name
from flags.base import OBJECTIVES, RAW_MOE, TASKS
from flags.evaluate import EvaluateArgs, EvaluateHelpfulnessArgs, EvaluateSafetyArgs, EvaluateTruthArgs, ReportArgs
from flags.fuse import ExtractArgs, FuseAdaptersArgs, FuseMoeArgs
from flags.inference import InferenceArgs
from flags.mask import MaskArgs
from flags.mask_figures import MaskFiguresArgs
from flags.realign import RealignArgs
from flags.safety_set import SafetySetArgs
from flags.skills import EvaluateSkillsArgs
from flags.sweep import SweepArgs
from flags.utility import EvaluateUtilityArgs

ALL = (AgreementArgs, AlignArgs, FuseMoeArgs, FuseAdaptersArgs, ExtractArgs, InferenceArgs,
       EvaluateSafetyArgs, EvaluateHelpfulnessArgs, EvaluateTruthArgs, EvaluateSkillsArgs, EvaluateUtilityArgs,
       ReportArgs, SafetySetArgs, SweepArgs)

__all__ = ["ALL", "OBJECTIVES", "RAW_MOE", "TASKS", "AgreementArgs", "AlignArgs", "EvaluateArgs", "EvaluateHelpfulnessArgs",
           "EvaluateSafetyArgs", "EvaluateTruthArgs", "EvaluateSkillsArgs", "EvaluateUtilityArgs", "ExtractArgs",
           "FuseAdaptersArgs", "FuseMoeArgs", "InferenceArgs", "MaskArgs", "MaskFiguresArgs", "RealignArgs", "ReportArgs",
           "SafetySetArgs", "SweepArgs", "run_name"]
