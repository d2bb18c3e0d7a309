"""``python -m efft_lab`` is the command `efft`."""

import sys

from efft_lab.cli import main

sys.exit(main())
