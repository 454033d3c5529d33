"""Learning to optimize: update rules meta-trained on quadratics or on MNIST, beside hand-tuned optimizers."""

from hyperax.experiments.learned_optimizer.recipes import LearnedOptimizerMnist, LearnedOptimizerQuadratics

__all__ = ["LearnedOptimizerMnist", "LearnedOptimizerQuadratics"]
