"""`python -m star_export` is `star-export`."""
import sys

from .cli import main

sys.exit(main())
