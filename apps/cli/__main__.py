"""python -m apps.cli: the `sana` command where it is not installed."""

import sys

from apps.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
