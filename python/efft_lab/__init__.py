"""Run experiments with EFFT, mostly on vision models. This package also provides the command `efft`.

The package contains data sets, backbones, training runs, comparisons of methods, studies and the demo. The libraries
``efft`` and ``efft_kernels`` never import this package.
"""

from __future__ import annotations
