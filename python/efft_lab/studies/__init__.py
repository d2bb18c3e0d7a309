"""Study what adapters learn, and which settings of adapters give the best accuracy.

``subspaces``, ``starts``, ``text``, ``convolutions`` and ``extras`` are studies. ``python -m benchmarks NAME`` runs a
study, which trains models and appends the results to a file. ``side_by_side`` is code for ``text`` and
``convolutions``, and ``stacked`` is code for ``extras``.
"""
