"""Times, memory and arithmetic of backbones and whole models by every route: what ``tools/benchmark.py`` measures."""
