"""Study what adapters learn. Each module answers one question with training runs, a result file and a plot."""
