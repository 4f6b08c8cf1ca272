import sys

from gisp.cli import main

sys.exit(main())
