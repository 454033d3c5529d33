"""One meta-learner over several data sets of other image sizes and numbers of classes, beside one for each alone."""

from hyperax.experiments.mixed_domains.study import MixedDomains

__all__ = ["MixedDomains"]
