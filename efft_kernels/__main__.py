"""Run ``python -m efft_kernels``, which prints a report on the environment and exits with 1 if a self-test failed.

``python -m efft_kernels build`` compiles the extension instead (:mod:`efft_kernels.build`).
"""

from __future__ import annotations

import sys

from efft_kernels import build
from efft_kernels.env import report

if sys.argv[1:2] == ["build"]:
    sys.exit(build.main(sys.argv[2:]))
text = report()
print(text)
sys.exit("FAILED" in text)
