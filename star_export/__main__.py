"""`python -m star_export` is `star-export`."""

import sys

from .cli.parser import main

sys.exit(main())
