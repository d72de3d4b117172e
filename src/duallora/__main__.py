"""``python -m duallora`` is the command ``duallora``."""

import sys

from duallora.cli import main

if __name__ == "__main__":
    sys.exit(main())
