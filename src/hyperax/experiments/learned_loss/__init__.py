"""Learned ground losses beside cross-entropy: clean few-shot tasks, and tasks with wrong labels."""

from hyperax.experiments.learned_loss.study import LearnedLosses

__all__ = ["LearnedLosses"]
