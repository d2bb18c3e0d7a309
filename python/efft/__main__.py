"""``python -m efft`` is the command `efft`, found by its entry point: the library does not import the laboratory."""

import sys
from importlib.metadata import entry_points

commands = entry_points(group="console_scripts", name="efft")
if not commands:
    sys.exit("the command `efft` is not installed: pip install efft-kernels (in a checkout: python -m efft_lab)")
sys.exit(next(iter(commands)).load()())
