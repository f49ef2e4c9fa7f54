"""`flexivid latency` as a script."""

import sys

from flexivid.commands.latency import main

if __name__ == "__main__":
    sys.exit(main())
