"""Fusion of weights (``merge.py``: recipe -> plan -> blocks -> method) and of adapters (``adapters.py``)."""
