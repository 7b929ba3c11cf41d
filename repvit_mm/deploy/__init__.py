"""Everything that leaves PyTorch: folding whole models, exporting them, and running the files.

Importing this package imports nothing else. Running a file needs no torch. ``metadata`` and ``runtimes`` need numpy and
the library of the file that is opened; ``prediction`` and ``sources`` also need OpenCV; ``picture``, ``results`` and
``predict`` also need supervision. The other modules need torch and MMEngine.
"""
