"""`flexivid calibrate` as a script."""

import sys

from flexivid.commands.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
