"""LoRA adapters on their files alone: read, compare, fuse, extract, write; a weighted sum as a model."""
