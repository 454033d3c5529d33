"""Ground losses that are learned: hyperparameters between the logits of a ground model and its training error."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.constraints import Constraint, Logarithmic, Projected, UnitInterval
from hyperax.fewshot.targets import Targets
from hyperax.rollout import check_steps


class GroundLoss(eqx.Module):
    """A loss l_lam whose parameters, the arrays of the module, are hyperparameters.

        L(w, lam) = mean over the images of l_lam(logits(w), targets)

    A subclass has `per_image`, and `constraint` if its parameters have to stay in sets. A call is the mean, over the
    images that are there; `Targets(one_hot)` makes targets of any classification problem.

    Cost: its own; nothing is kept between calls.
    Reference: Bridge paper 2017, Sec. 3, "learning ground loss functions".
    Do not use it as the outer objective too: a loss that is free to choose what it measures makes itself small.

    >>> targets = Targets(jnp.eye(2))
    >>> round(float(CrossEntropy()(jnp.zeros((2, 2)), targets)), 4)
    0.6931
    """

    @abstractmethod
    def per_image(self, logits: Float[Array, "images ways"], targets: Targets) -> Float[Array, " images"]:
        """The loss of each image; of padding, any finite number."""

    def constraint(self) -> Any:
        """What `minimize` has to keep: a prefix of the module with sets, or `None`."""
        return None

    def __call__(self, logits: Float[Array, "images ways"], targets: Targets) -> Array:
        """The mean of `per_image` over the images that are there."""
        losses = self.per_image(logits, targets)
        return jnp.mean(losses) if targets.weights is None else jnp.sum(targets.weights * losses)


@final
class CrossEntropy(GroundLoss):
    """Cross-entropy, which has nothing to learn: l = -sum_c y_c log p_c with p = softmax(logits).

    Cost: one softmax.
    Do not use it alone where `HyperRepresentation` says the same.

    >>> round(float(CrossEntropy()(jnp.array([[2.0, 0.0]]), Targets(jnp.array([[1.0, 0.0]])))), 4)
    0.1269
    """

    def per_image(self, logits: Float[Array, "images ways"], targets: Targets) -> Float[Array, " images"]:
        """-log p at the target."""
        return -jnp.sum(targets.one_hot * log_softmax(logits, targets), -1)


@final
class ParametricCrossEntropy(GroundLoss):
    """Cross-entropy with a temperature, label smoothing, a power and weights of the classes, whichever are learned.

        l = v_y sum_c y'_c (1 - p_c^q) / q,   p = softmax(logits / tau),   y' = (1 - epsilon) y + epsilon / N

    with N the number of classes of the task. At q -> 0 the fraction is -log p_c, and l is cross-entropy: tau = 1,
    epsilon = 0, q = 0, v = 1, where all of them start. At q = 1 it is the probability of being wrong, which is bounded:
    an image that the model finds unlikely to have its label pulls at the model less, not more.

    Arguments:
        temperature: whether tau > 0 is learned; else 1.
        smoothing: whether epsilon, from 0 to 1, is learned; else 0.
        power: whether q, from 0 to 1, is learned; else 0.
        classes: the number of classes whose weights v > 0 are learned; `None`: all 1.

    epsilon and q begin at the border of [0, 1], so they are kept there by projection; see `constraint`.
    Raises: `ValueError` if nothing is learned.
    Cost: elementwise beside the softmax.
    Reference: Bridge paper 2017, Sec. 3; Zhang and Sabuncu 2018, eq. 6 (the power); Szegedy et al. 2016, Sec. 7
    (smoothing).
    Do not use weights of classes where classes have no fixed meaning: class 0 of a few-shot episode is so by chance.

    >>> loss = ParametricCrossEntropy(smoothing=False)
    >>> logits, targets = jnp.array([[2.0, 0.0], [2.0, 0.0]]), Targets(jnp.eye(2))
    >>> [round(float(x), 4) for x in loss.per_image(logits, targets)]  # cross-entropy
    [0.1269, 2.1269]
    >>> bounded = eqx.tree_at(lambda loss: loss.power, loss, jnp.ones(()))
    >>> [round(float(x), 4) for x in bounded.per_image(logits, targets)]
    [0.1192, 0.8808]

    In a bilevel problem of one's own: the labels of 100 points are right in two of three cases, those of 100 others
    always. After ten steps the points whose labels look wrong have been left to be wrong.

    >>> import hyperax as hx, optax
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> label = jnp.repeat(jnp.arange(2), 100)
    >>> x = 2 * label[:, None] - 1 + jax.random.normal(keys[0], (200, 2))
    >>> seen = jnp.where(jax.random.uniform(keys[1], (200,)) < 1 / 3, 1 - label, label)
    >>> train, clean = (Targets(jax.nn.one_hot(labels[part], 2)) for labels, part in
    ...                 ((seen, slice(0, None, 2)), (label, slice(1, None, 2))))
    >>> problem = hx.Problem(
    ...     inner=lambda w, lam, d: lam(x[::2] @ w, train),
    ...     outer=lambda w, lam, d: CrossEntropy()(x[1::2] @ w, clean),
    ...     init=lambda lam, d: jnp.zeros((2, 2)),
    ... )
    >>> f = hx.hypergradient(problem, hx.GradientDescent(2.0), hx.Reverse(10))
    >>> solution = hx.minimize(f, loss, optimizer=optax.adam(0.1), steps=50, constraint=loss.constraint())
    >>> solution.value < solution.history[0]["value"] - 0.05, bool(solution.lam.power > 0)
    (True, True)
    """

    temperature: Float[Array, ""] | None
    smoothing: Float[Array, ""] | None
    power: Float[Array, ""] | None
    class_weights: Float[Array, " ways"] | None

    def __init__(
        self, *, temperature: bool = True, smoothing: bool = True, power: bool = True, classes: int | None = None
    ):
        if classes is not None:
            check_steps(classes, "classes", 2)
        if not (temperature or smoothing or power or classes):
            raise ValueError("no parameter of the loss is learned: choose one, or use CrossEntropy()")
        number = lambda value, learned: jnp.asarray(value, jnp.float32) if learned else None
        self.temperature = number(1.0, temperature)
        self.smoothing = number(0.0, smoothing)
        self.power = number(0.0, power)
        self.class_weights = None if classes is None else jnp.ones(classes, jnp.float32)

    def constraint(self) -> Any:
        """tau, v > 0 and epsilon, q in [0, 1]."""
        sets = {
            "temperature": Logarithmic(),
            "smoothing": Projected(UnitInterval()),
            "power": Projected(UnitInterval()),
            "class_weights": Logarithmic(),
        }
        return sets_of(self, {name: kept for name, kept in sets.items() if getattr(self, name) is not None})

    def per_image(self, logits: Float[Array, "images ways"], targets: Targets) -> Float[Array, " images"]:
        """The equation, in its order."""
        log_p = log_softmax(logits if self.temperature is None else logits / self.temperature, targets)
        wrong = -log_p if self.power is None else -log_p * relative_expm1(self.power * log_p)
        smoothed = targets.one_hot
        if self.smoothing is not None:
            there = classes_there(targets, log_p.dtype)
            smoothed = (1 - self.smoothing) * smoothed + self.smoothing * there / jnp.sum(there)
        losses = jnp.sum(smoothed * wrong, -1)
        return losses if self.class_weights is None else targets.one_hot @ self.class_weights * losses


@final
class NetworkLoss(GroundLoss):
    """A loss and a network's correction to it, which treats all classes alike, so that it serves any number of them.

        x_c = (z_c - mean of z, y_c, p_c),   a_c = silu(A x_c + a),   b_c = silu(B [a_c, mean of a] + b),
        l = base(z, y) + v . (mean of b)

    with z the logits, p = softmax(z), and means over the classes of the task. v starts at 0, so l starts as the base
    exactly. The smooth activations give second derivatives, which a hypergradient needs; and they are linear far from
    0, so that the correction can take the linear growth of the cross-entropy of a wrong label away again.

    Arguments:
        key: draws A and B.
        hidden: units of the two layers.
        base: the loss that is corrected; `None`: `CrossEntropy()`.

    Raises: `ValueError` without a key.
    Cost: 2 hidden^2 multiplications for each class of each image; at 16 units far less than a representation.
    Reference: Bridge paper 2017, Sec. 3; the equivariant layer (each class with the mean of all) as in Zaheer et al.
    2017, eq. 4.
    Do not use it where few tasks are seen: it has hundreds of parameters, and the outer objective alone keeps it a
    sensible loss. And not with T = 1 from w_0 = 0, where it is a scale (see `LearnedLoss`).

    >>> loss, targets = NetworkLoss(jax.random.key(0)), Targets(jnp.eye(3))
    >>> logits = jnp.array([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [9.0, 9.0, 0.0]])
    >>> bool(jnp.all(loss.per_image(logits, targets) == CrossEntropy().per_image(logits, targets)))
    True
    """

    base: GroundLoss
    first: Float[Array, "3 hidden"]
    first_bias: Float[Array, " hidden"]
    second: Float[Array, "2_hidden hidden"]
    second_bias: Float[Array, " hidden"]
    last: Float[Array, " hidden"]

    def __init__(self, key: Key[Array, ""] | None, hidden: int = 16, base: GroundLoss | None = None):
        check_steps(hidden, "hidden", 1)
        if key is None:
            raise ValueError(
                "NetworkLoss draws its layers: give it, or the learner's lam, a key (jax.random.key(seed))"
            )
        for_first, for_second = jax.random.split(key)
        self.base = CrossEntropy() if base is None else base
        self.first = jax.random.normal(for_first, (3, hidden), jnp.float32)
        self.second = jax.random.normal(for_second, (2 * hidden, hidden), jnp.float32) / hidden**0.5
        self.first_bias, self.second_bias, self.last = (jnp.zeros(hidden, jnp.float32) for _ in range(3))

    def constraint(self) -> Any:
        """That of the base."""
        return sets_of(self, {"base": self.base.constraint()})

    def per_image(self, logits: Float[Array, "images ways"], targets: Targets) -> Float[Array, " images"]:
        """The equation, in its order."""
        there = classes_there(targets, logits.dtype)[:, None]
        mean = lambda x: jnp.sum(x * there, -2, keepdims=True) / jnp.sum(there)
        p = there * jnp.exp(log_softmax(logits, targets))[..., None]
        x = jnp.concatenate([logits[..., None] - mean(logits[..., None]), targets.one_hot[..., None], p], -1)
        a = jax.nn.silu(x @ self.first + self.first_bias)
        both = jnp.concatenate([a, jnp.broadcast_to(mean(a), a.shape)], -1)
        b = jax.nn.silu(both @ self.second + self.second_bias)
        return self.base.per_image(logits, targets) + (mean(b) @ self.last)[..., 0]


def classes_there(targets: Targets, dtype: Any) -> Float[Array, " ways"]:
    """1 for a class of the task, 0 for another."""
    if targets.absent is None:
        return jnp.ones(targets.one_hot.shape[-1], dtype)
    return (targets.absent == 0).astype(dtype)


def log_softmax(logits: Float[Array, "images ways"], targets: Targets) -> Float[Array, "images ways"]:
    """The logarithms of p over the classes of the task; 0 at those that are absent, where they would be near -1e9."""
    if targets.absent is None:
        return jax.nn.log_softmax(logits)
    return jnp.where(targets.absent == 0, jax.nn.log_softmax(logits + targets.absent), 0)


def relative_expm1(u: Array) -> Array:
    """(exp(u) - 1) / u with all its derivatives, at u = 0 too.

    >>> float(relative_expm1(jnp.asarray(0.0))), round(float(jax.grad(relative_expm1)(1e-8)), 4)
    (1.0, 0.5)
    """
    near = jnp.abs(u) < 0.05
    # Each branch is kept away from the other's arguments: a derivative that is not chosen must still be finite.
    small, large = jnp.where(near, u, 0), jnp.where(near, 1, u)
    series = jnp.ones_like(u)
    for order in range(8, 1, -1):  # the next term is 0.05^8 / 9! = 1e-16, the rounding of float64
        series = 1 + small / order * series
    return jnp.where(near, series, jnp.expm1(large) / large)


def sets_of(module: Any, sets: dict[str, Constraint | Any]) -> Any:
    """A prefix of a module with these entries in its fields and `None` in the others.

    >>> sets_of(ParametricCrossEntropy(smoothing=False, power=False), {"temperature": Logarithmic()}).temperature
    Logarithmic()
    """
    is_none = lambda node: node is None
    free = jax.tree.map(lambda leaf: None, module)
    return eqx.tree_at(lambda m: [getattr(m, name) for name in sets], free, list(sets.values()), is_leaf=is_none)
