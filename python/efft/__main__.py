"""``python -m efft`` is the command `efft`."""

import sys

from efft.cli import main

sys.exit(main())
