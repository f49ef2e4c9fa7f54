"""python -m flexivid models        what is supported, and what patch sizes cost"""

import sys

from flexivid.models import page


def main(argv: list[str]) -> int:
    if argv != ["models"]:
        print(__doc__, file=sys.stderr)
        return 2
    for line in page():
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
