"""Say what is installed and whether it fits together: python tools/doctor.py [CONFIG]."""

import sys
from pathlib import Path

# In a checkout that is not installed, too: that is one of the things it says.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from repvit_mm_cli.doctor import main

if __name__ == '__main__':
    sys.exit(main())
