"""What runs around a model's program: a kernel-confined process for it, another one for its checker, JSON between them."""
