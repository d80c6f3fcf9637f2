"""A report as one HTML file that opens from the file system: no network, no script or font from elsewhere."""
