"""The flags of every command, as dataclasses. Read by ``config.parse``; the standard library only."""

from commands.align import AlignArgs, run_name
from commands.base import OBJECTIVES, RAW_MOE, TASKS
from commands.evaluate import EvaluateArgs, EvaluateHelpfulnessArgs, EvaluateSafetyArgs, EvaluateTruthArgs, ReportArgs
from commands.fuse import ExtractArgs, FuseAdaptersArgs, FuseMoeArgs
from commands.inference import InferenceArgs

ALL = (AlignArgs, FuseMoeArgs, FuseAdaptersArgs, ExtractArgs, InferenceArgs, EvaluateSafetyArgs,
       EvaluateHelpfulnessArgs, EvaluateTruthArgs, ReportArgs)

__all__ = ["ALL", "OBJECTIVES", "RAW_MOE", "TASKS", "AlignArgs", "EvaluateArgs", "EvaluateHelpfulnessArgs",
           "EvaluateSafetyArgs", "EvaluateTruthArgs", "ExtractArgs", "FuseAdaptersArgs", "FuseMoeArgs", "InferenceArgs",
           "ReportArgs", "run_name"]
