"""One adapted linear layer at a time: the frozen floor against every way to add the low-rank update."""
