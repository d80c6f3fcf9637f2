"""From statements to pages: figures, tables, published numbers."""
