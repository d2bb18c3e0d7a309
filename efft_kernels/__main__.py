"""``python -m efft_kernels``: print the environment report; exit code 1 if a self-test failed."""

import sys

from efft_kernels.env import report

text = report()
print(text)
sys.exit("FAILED" in text)
