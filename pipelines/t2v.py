"""`flexivid sample` as a script."""

import sys

from flexivid.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
