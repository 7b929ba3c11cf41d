"""What reaches into private parts of the frameworks, each with its reason, so that an upgrade breaks these two files.

``pytorch`` needs torch alone, ``openmmlab`` also MMEngine. Where there is a public way it is taken, elsewhere.
"""
