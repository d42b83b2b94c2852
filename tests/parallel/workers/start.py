"""A launcher of nothing in particular: COUNT NAME=VALUE... -- COMMAND... starts so many processes, each with these variables.

{i} in a value is the number of the process. Ends with the first exit status that is not 0.
"""

from __future__ import annotations

import os
import subprocess
import sys

count, split = int(sys.argv[1]), sys.argv.index("--")
variables = [word.split("=", 1) for word in sys.argv[2:split]]
started = [
    subprocess.Popen(
        sys.argv[split + 1 :], env={**os.environ, **{name: value.replace("{i}", str(i)) for name, value in variables}}
    )
    for i in range(count)
]
sys.exit(max(abs(process.wait()) for process in started))
