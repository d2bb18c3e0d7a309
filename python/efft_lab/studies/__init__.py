"""Study what adapters learn, and how they should be set.

``subspaces``, ``starts``, ``text``, ``convolutions`` and ``extras`` are studies. Each runs as ``python -m benchmarks
NAME``, trains models and appends its results to ``benchmarks/results/NAME.jsonl``. ``side_by_side`` and ``stacked`` are
training code that several studies use.
"""
