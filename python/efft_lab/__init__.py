"""The laboratory: experiments with the method on vision models, and the command `efft`.

Data sets, backbones, training runs, comparisons of methods, studies and the demo live here. The library (``efft`` and
``efft_kernels``) never imports it.
"""

from __future__ import annotations
