"""Few-shot learning: data sets, episodes, networks, learners, evaluation. Needs `pip install hyperax[data]`."""
