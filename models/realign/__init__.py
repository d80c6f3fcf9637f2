"""Realignment: task vectors put back on their aligned model by a method and a rule."""
