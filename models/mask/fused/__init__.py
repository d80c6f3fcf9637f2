"""Concrete masks on a GPU: few kernels per draw, and none of their numbers stored between the passes."""
