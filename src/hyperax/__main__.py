"""`python -m hyperax` is the command `hyperax`."""

import sys

from hyperax.cli import main

sys.exit(main())
