"""Everything that leaves PyTorch: folding whole models, exporting them, and running the files.

Importing this package imports nothing else. ``metadata`` and ``runtimes`` need numpy only, and the library that
runs the file which is opened; the other modules need torch and MMEngine.
"""
