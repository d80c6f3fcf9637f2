"""The fused mixture of experts: its layer, the sum over experts, the router, its files."""
