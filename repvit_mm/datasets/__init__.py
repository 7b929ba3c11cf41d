"""Data sets that the package makes by itself."""
