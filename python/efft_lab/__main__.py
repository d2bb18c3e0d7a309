"""Run the command `efft` as ``python -m efft_lab``."""

import sys

from efft_lab.cli import main

sys.exit(main())
