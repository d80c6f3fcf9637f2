"""What a sweep over the fusion weight says: its curve, report, picture, and the common report of several seeds."""
