"""Refusal by likelihood: how probable a refusal is as the beginning of an answer, and how well that tells harm."""
