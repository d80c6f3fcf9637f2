"""Trainer wiring, one file per objective: sft, dpo, moe."""
