"""`python -m lococo`, which launchers of several processes take."""

import sys

from lococo.cli import main

if __name__ == "__main__":
    sys.exit(main())
