"""Studies of what is learned: each module answers one question with training runs, a result file and a picture."""
