"""`flexivid sweep` as a script."""

import sys

from flexivid.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main())
