"""Study what adapters learn, and which settings and number formats give the best accuracy.

``subspaces``, ``starts``, ``text``, ``convolutions``, ``extras`` and ``fp8`` are studies. ``python -m benchmarks NAME``
runs a study, which trains models and appends the results to a file. ``side_by_side`` is code that several studies use,
and ``stacked`` is code for ``extras``.
"""
