"""Scores with intervals: one command per question, plus the report and its pictures."""
