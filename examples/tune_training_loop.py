"""A step-size schedule and the weight decays of two layers, learned: `python tune_training_loop.py [HYPERITERATIONS]`.

    min over h of E(w_T(h)),   w_t = w_{t-1} + update_h(grad_w L(w_{t-1}, batch_t, h)),   t = 1, ..., T

A network for scikit-learn's digits, an ordinary Optax loop of T steps. hx.tune differentiates the validation loss after
training through all of these steps. Needs scikit-learn: pip install "hyperax[estimators]".
"""

import sys

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.utils import shuffle

import hyperax as hx

hyperiterations = int(sys.argv[1]) if len(sys.argv) > 1 else 40
T = 150 if hyperiterations > 5 else 16

x, y = shuffle(*load_digits(return_X_y=True), random_state=0)
train, validation, test = ({"x": x[a:b] / 16, "y": y[a:b]} for a, b in ((0, 600), (600, 1200), (1200, 1797)))


def cross_entropy(w, d):
    """The mean over the examples d."""
    hidden = jax.nn.relu(d["x"] @ w["first"] + w["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ w["last"], d["y"]).mean()


def training_loss(w, batch, h):
    """With a weight decay of each layer from h."""
    return cross_entropy(w, batch) + sum(h["decay"][layer] * jnp.sum(w[layer] ** 2) for layer in ("first", "last"))


one, two = jax.random.split(jax.random.key(1))
w = {"first": jax.random.normal(one, (64, 40)) / 8, "bias": jnp.zeros(40), "last": jax.random.normal(two, (40, 10)) / 6}

tuned = hx.tune(
    training_loss,
    cross_entropy,
    params=w,
    optimizer=lambda h: optax.sgd(hx.piecewise_schedule(h["step_size"], T), momentum=0.9),
    hyperparameters={
        "step_size": hx.logit_scale(jnp.full(5, 0.02), high=0.5),  # five knots; the bound keeps the run stable
        "decay": {"first": hx.log_scale(1e-3), "last": hx.log_scale(1e-3)},
    },
    data=train,
    validation_data=validation,
    steps=T,
    batch_size=50,
    key=jax.random.key(2),
    hyperiterations=hyperiterations,
)
h = tuned.hyperparameters
print(f"validation loss: {tuned.before:.3f} before, {tuned.after:.3f} after ({tuned.stopped})")
print("step size at the five knots:", " ".join(f"{knot:.3f}" for knot in h["step_size"]))
print("weight decay:", ", ".join(f"{layer} {value:.1e}" for layer, value in h["decay"].items()))
print(f"test loss: {cross_entropy(tuned.params, test):.3f}")
