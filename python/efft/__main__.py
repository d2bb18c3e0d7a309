"""Run the command ``efft`` by ``python -m efft``.

The command is found by its entry point, because the library must not import ``efft_lab``.
"""

import sys
from importlib.metadata import entry_points

commands = entry_points(group="console_scripts", name="efft")
if not commands:
    sys.exit("the command `efft` is not installed: pip install efft-kernels (in a checkout: python -m efft_lab)")
sys.exit(next(iter(commands)).load()())
