"""MAML's hypergradient against torch.func in float64, where torch is; test_initialisation.py has a plain JAX loop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.hyper_representation import Classifier
from hyperax.fewshot.learners.maml import maml
from hyperax.fewshot.networks import OmniglotNet

WAYS, FILTERS, SIDE, STEPS, STEP_SIZE, TASKS = 3, 4, 12, 3, 0.4, 2


def drawn():
    """Two episodes of random images, and lam: (network, head), every leaf away from its initial value."""
    draw = np.random.default_rng(0)
    # Black and white, as Omniglot's: the learner divides by 255 in float32, which is exact for these.
    images = lambda count: jnp.asarray(255 * draw.integers(0, 2, (TASKS, count, SIDE, SIDE, 1)), jnp.uint8)
    labels = lambda shots: jnp.tile(jnp.repeat(jnp.arange(WAYS), shots), (TASKS, 1))
    episodes = Episode(images(WAYS), labels(1), images(2 * WAYS), labels(2))
    network = OmniglotNet((SIDE, SIDE, 1), jax.random.key(0), filters=FILTERS)
    network = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(scale=0.3, size=leaf.shape)), network)
    head = Classifier(jnp.asarray(draw.normal(size=(WAYS, FILTERS))), jnp.asarray(draw.normal(size=WAYS)))
    return {"network": network, "head": head}, episodes


LAM, EPISODES = drawn()


@pytest.fixture(scope="module")
def found():
    """The hypergradient of the learner, its leaves in the order of `parameters`."""
    learner = maml(WAYS, STEP_SIZE, head="learned")
    h = hx.mean_over_tasks(learner.hypergradient(learner.method(STEPS)), parallel=1)(LAM, EPISODES)
    return h.value, parameters(h.grad)


def parameters(lam):
    """Convolutions [size, size, in, out], shifts, weight [ways, features], bias: NumPy arrays."""
    network = lam["network"]
    layers = [c.weight for c in network.convolutions], [n.beta for n in network.normalisations]
    return [np.asarray(leaf) for leaf in (*layers[0], *layers[1], *lam["head"])]


def test_maml_is_torch_func(found):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    def loss(w, images, labels):
        x = images
        for kernel, shift in zip(w[:4], w[4:8], strict=True):
            before, after = padding(x.shape[-1])
            x = functional.conv2d(functional.pad(x, (before, after) * 2), kernel, stride=2)
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            x = functional.relu((x - mean) / torch.sqrt(variance + 1e-3) + shift[:, None, None])
        features = x.permute(0, 2, 3, 1).flatten(1)
        return functional.cross_entropy(functional.linear(features, w[8], w[9]), labels)

    def mean_value(w):
        values = []
        for support, support_labels, query, query_labels in episodes:
            w_t = w
            for _ in range(STEPS):
                slope = torch.func.grad(loss)(w_t, support, support_labels)
                w_t = [leaf - STEP_SIZE * g for leaf, g in zip(w_t, slope, strict=True)]
            values.append(loss(w_t, query, query_labels))
        return torch.stack(values).mean()

    def tensor(part):
        if part.ndim == 1:
            return torch.tensor(np.asarray(part, np.int64))
        return torch.tensor(np.asarray(part, np.float64).transpose(0, 3, 1, 2) / 255)

    episodes = [[tensor(part[j]) for part in EPISODES[:4]] for j in range(TASKS)]
    w = [torch.tensor(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x) for x in parameters(LAM)]
    expected = [x.numpy() for x in torch.func.grad(mean_value)(w)]
    for ours, theirs in zip(found[1], expected, strict=True):
        theirs = theirs.transpose(2, 3, 1, 0) if theirs.ndim == 4 else theirs
        assert np.linalg.norm(ours - theirs) <= 1e-8 * np.linalg.norm(theirs) > 0


def padding(side):
    """(before, after) of SAME padding, a 3 x 3 window and stride 2."""
    total = max(2 * (-(-side // 2) - 1) + 3 - side, 0)
    return total // 2, total - total // 2


def test_every_parameter_is_compared():
    assert len(parameters(LAM)) == len(jax.tree.leaves(eqx.filter(LAM, eqx.is_array)))
