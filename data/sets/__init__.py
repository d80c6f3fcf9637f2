"""Named data sets: embedded, published and our own; what each row means, and what must not leak into training."""
