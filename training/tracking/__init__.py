"""Where a training tells its losses while it runs."""
