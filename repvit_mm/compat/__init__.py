"""What reaches into private parts of other libraries, each with its reason: an upgrade breaks these files alone.

``pytorch`` needs torch alone, ``openmmlab`` also MMEngine, ``mmcv`` and ``coreml`` the library of their name. Where
there is a public way it is taken, elsewhere.
"""
