"""Answers from a run: one protocol (backends), a file for each back end, and what the router did with the tokens."""

from models.generation.answers import Answer, Decoding, check_lengths, left_pad, pad_id, stop_ids
from models.generation.hf import answer_batch
from models.generation.router_shares import router_shares

__all__ = ["Answer", "Decoding", "answer_batch", "check_lengths", "left_pad", "pad_id", "router_shares", "stop_ids"]
