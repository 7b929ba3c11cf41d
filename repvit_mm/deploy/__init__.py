"""Everything that leaves PyTorch: folding whole models, exporting them, and running the files.

Importing this package imports nothing else. ``metadata`` and ``runtimes`` need numpy only, and of the runtimes' libraries
the one of the file that is opened; the other modules need torch and MMEngine.
"""
