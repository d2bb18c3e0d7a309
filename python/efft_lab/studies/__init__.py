"""Questions about what is learned: each module answers one from training runs, a result file and a picture."""
