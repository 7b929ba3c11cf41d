"""Every launcher imports this first: a missing or broken library then gives one line, not a traceback."""

import sys
import warnings
from pathlib import Path
from types import TracebackType

CHECKOUT = Path(__file__).resolve().parent.parent


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a failed import on one line, with what to do about it.

    Every other exception keeps its traceback, and so does a failed import inside this package or with ``--debug``.

    Args:
        kind: Type of an exception that nothing has caught.
        error: The exception.
        trace: Where it was raised.
    """
    if not isinstance(error, ImportError) or '--debug' in sys.argv or str(error.name).startswith('repvit_mm.'):
        sys.__excepthook__(kind, error, trace)
        return
    program = sys.argv[0]
    if program.startswith('repvit-mm'):
        advice = 'repvit-mm doctor says what to install'
    elif error.name == 'repvit_mm':
        advice = f'pip install {CHECKOUT}'
    else:
        advice = 'activate the environment that has it (`make setup` makes .venv), or ask tools/doctor.py'
    text = ' '.join(str(error).split())
    print(f'{program}: {text} ({sys.executable}); {advice}', file=sys.stderr)


sys.excepthook = tell
# mmengine 0.10 imports pkg_resources, which says at every import that it will go.
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
