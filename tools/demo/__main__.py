"""`python -m tools.demo run=NAME`: the driver is tools/run_demo.py."""

import sys

from tools.command import run
from tools.run_demo import main

if __name__ == "__main__":
    sys.exit(run(main))
