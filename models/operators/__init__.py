"""Every formula of fusion once, as pure functions on tensors or blocks; no file and no model."""
