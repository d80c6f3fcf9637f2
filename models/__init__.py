"""Tensors and modules: loading, the fused mixture of experts, fusion of adapters. Knows no trainer."""

import logging
import warnings

# Two lines that packages print at every start and that a user can do nothing about: bitsandbytes (which peft imports) on a
# kernel that only its own 4-bit products would use, and transformers on an attribute that peft reads.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
