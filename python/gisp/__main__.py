"""``python -m gisp``: the command line, also for launchers that start modules."""

import sys

from gisp.cli import main

sys.exit(main())
