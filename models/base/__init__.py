"""Base models: where they run, how they are found and loaded, and what differs between families."""
