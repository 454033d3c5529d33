"""One regulariser a word for 20 Newsgroups: words, problem, study."""

from hyperax.experiments.newsgroups.study import Newsgroups

__all__ = ["Newsgroups"]
