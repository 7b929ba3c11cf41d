"""Everything that uses private parts of other libraries, with the reason for each use.

An upgrade of a library can break these files and no others. ``pytorch`` needs only torch, ``openmmlab`` also MMEngine;
``mmcv`` and ``coreml`` need the library of their name. What has a public way is not done here.
"""
