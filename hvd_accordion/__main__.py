"""python -m hvd_accordion"""

import sys

from hvd_accordion.cli import main

if __name__ == "__main__":
    sys.exit(main())
