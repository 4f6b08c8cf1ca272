import sys

from benchmarks.infer.run import main

sys.exit(main())
