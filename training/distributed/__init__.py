"""A training over several processes: who asks for it, how a model is parted, what processes agree on."""
