"""The names of ``__init__.py``, which loads each when it is asked for, as a type checker sees them."""

from flags.agreement import AgreementArgs as AgreementArgs
from flags.align import TRAINED as TRAINED
from flags.align import AlignArgs as AlignArgs
from flags.align import DpoArgs as DpoArgs
from flags.align import ExpertArgs as ExpertArgs
from flags.align import FusedMoeArgs as FusedMoeArgs
from flags.align import MaskArgs as MaskArgs
from flags.align import SearchArgs as SearchArgs
from flags.align import SoupArgs as SoupArgs
from flags.align import run_name as run_name
from flags.attack_table import AttackTableArgs as AttackTableArgs
from flags.base import OBJECTIVES as OBJECTIVES
from flags.base import RAW_MOE as RAW_MOE
from flags.base import TASKS as TASKS
from flags.base import Flags
from flags.durability import DurabilityArgs as DurabilityArgs
from flags.equal_utility import EqualUtilityArgs as EqualUtilityArgs
from flags.evaluate import EvaluateArgs as EvaluateArgs
from flags.evaluate import EvaluateHelpfulnessArgs as EvaluateHelpfulnessArgs
from flags.evaluate import EvaluateSafetyArgs as EvaluateSafetyArgs
from flags.evaluate import EvaluateTruthArgs as EvaluateTruthArgs
from flags.evaluate import ReportArgs as ReportArgs
from flags.evaluate import ScoredAnswersArgs as ScoredAnswersArgs
from flags.evaluate_models import EvaluateModelsArgs as EvaluateModelsArgs
from flags.export import ExportArgs as ExportArgs
from flags.export import GatherArgs as GatherArgs
from flags.export import ImportArgs as ImportArgs
from flags.fuse import ExtractArgs as ExtractArgs
from flags.fuse import FuseAdaptersArgs as FuseAdaptersArgs
from flags.fuse import FuseMoeArgs as FuseMoeArgs
from flags.inference import InferenceArgs as InferenceArgs
from flags.leaderboard import LeaderboardArgs as LeaderboardArgs
from flags.mask_figures import MaskFiguresArgs as MaskFiguresArgs
from flags.merge import MergeArgs as MergeArgs
from flags.paper_tables import PaperTableArgs as PaperTableArgs
from flags.paper_tables import PaperTablesArgs as PaperTablesArgs
from flags.realign import RealignArgs as RealignArgs
from flags.refusal import EvaluateRefusalArgs as EvaluateRefusalArgs
from flags.registry import CompareArgs as CompareArgs
from flags.registry import ExportScoresArgs as ExportScoresArgs
from flags.registry import ListArgs as ListArgs
from flags.registry import ShowArgs as ShowArgs
from flags.safety_set import SafetySetArgs as SafetySetArgs
from flags.skills import EvaluateSkillsArgs as EvaluateSkillsArgs
from flags.sweep import SweepArgs as SweepArgs
from flags.utility import EvaluateUtilityArgs as EvaluateUtilityArgs

ALL: tuple[type[Flags], ...]
COMMANDS: tuple[type[Flags], ...]
