"""What a sample is, where it comes from, and how it becomes token ids."""
