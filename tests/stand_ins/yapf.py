"""In the place of yapf: leaves a config's text as it is, which MMEngine would lay out five times in a run."""

import sys

__version__ = '0.40.2'


def FormatCode(text: str, **_: object) -> tuple[str, bool]:
    """What MMEngine calls."""
    return text, True


sys.modules['yapf.yapflib'] = sys.modules['yapf.yapflib.yapf_api'] = sys.modules[__name__]
