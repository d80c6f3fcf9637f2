"""Tensors and modules: loading, the fused mixture of experts, fusion of adapters. Knows no trainer."""

import console

# before peft and bitsandbytes are imported, for whoever uses the models without a command
console.mute()
