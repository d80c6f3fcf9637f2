"""Ways to fuse: METHODS maps a name to a pure function on adapters. A new method is one function and one row."""

from models.fusion.adapters import concatenate

METHODS = {"cat": concatenate}
