"""Merges of whole checkpoints: recipe, plan, budget, execution in blocks, vocabulary."""
