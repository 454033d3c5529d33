"""Data hyper-cleaning of MNIST: half of the training labels are wrong; which ones, and what is gained without them?"""

from hyperax.experiments.data_cleaning.study import DataCleaning

__all__ = ["DataCleaning"]
