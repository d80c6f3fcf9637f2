"""A run written in the layouts that other software reads, and such a folder read back."""
