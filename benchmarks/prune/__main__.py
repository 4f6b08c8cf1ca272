import sys

from benchmarks.prune.run import main

sys.exit(main())
