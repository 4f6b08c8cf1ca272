import sys

from benchmarks.common.command import exit_code
from benchmarks.embed.run import main

sys.exit(exit_code(main))
