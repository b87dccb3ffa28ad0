"""AutoRound (Cheng et al., arXiv 2309.05516) through the ``auto-round`` package: one block at a time, resumable."""
