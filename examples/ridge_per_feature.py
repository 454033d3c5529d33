"""One L2 coefficient a feature, tuned by gradient: no grid could. `python examples/ridge_per_feature.py [SAMPLES]`.

    min over alpha of  sum over folds of |X_val w - y_val|^2,   w = argmin |X w - y|^2 + sum_j alpha_j w_j^2

Ten features matter, ninety do not. A single coefficient (RidgeCV) has to shrink all of them alike; with one each, the
useless ones are shrunk more. Needs scikit-learn: pip install "hyperax[estimators]".
"""

import sys

import numpy as np
from sklearn.linear_model import RidgeCV

from hyperax.estimators import HypergradientRidge

samples = int(sys.argv[1]) if len(sys.argv) > 1 else 200
useful, useless = 10, 90

draw = np.random.default_rng(0)
X = draw.normal(size=(samples + 1000, useful + useless))
y = X[:, :useful] @ draw.normal(size=useful) + draw.normal(size=len(X))
X_train, y_train, X_test, y_test = X[:samples], y[:samples], X[samples:], y[samples:]

for name, model in {
    "RidgeCV, one coefficient": RidgeCV(np.logspace(-3, 5, 33), cv=5),
    "HypergradientRidge, one coefficient": HypergradientRidge("one", cv=5),
    "HypergradientRidge, one a feature": HypergradientRidge("per-feature", cv=5),
}.items():
    model.fit(X_train, y_train)
    error = np.mean((model.predict(X_test) - y_test) ** 2)
    print(f"{name:<36} test error {error:.3f}")

alpha = model.alpha_
print(
    f"median alpha: {np.median(alpha[:useful]):.3g} of useful features, {np.median(alpha[useful:]):.3g} of useless ones"
)
print(f"found in {model.n_hyperiterations_} hyperiterations")
