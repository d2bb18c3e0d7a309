"""``python -m efft_kernels``: print the environment report; exit code 1 if a self-test failed.

``python -m efft_kernels build`` compiles the extension instead (:mod:`efft_kernels.build`).
"""

import sys

from efft_kernels import build
from efft_kernels.env import report

if sys.argv[1:2] == ["build"]:
    sys.exit(build.main(sys.argv[2:]))
text = report()
print(text)
sys.exit("FAILED" in text)
