"""`python -m halfbyte`: the command `halfbyte`."""

import sys

from .cli import main

sys.exit(main())
