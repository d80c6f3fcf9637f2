"""Tensors and modules: loading, the fused mixture of experts, fusion of adapters. Knows no trainer."""
