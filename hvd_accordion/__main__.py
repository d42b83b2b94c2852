"""python -m hvd_accordion"""

import sys

from hvd_accordion.command_line import main

if __name__ == "__main__":
    sys.exit(main())
