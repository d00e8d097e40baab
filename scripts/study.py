"""Every experiment of a study from one command; --help says how."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.study.command import main

if __name__ == "__main__":
    sys.exit(main())
