"""The memory-augmented network: an LSTM that writes the support set into a memory, and reads it for a query image."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.sequences import SequenceLearner
from hyperax.fewshot.learners.similarities import cosines, features_and_key, present
from hyperax.fewshot.networks import Network
from hyperax.rollout import check_steps


class Memory(NamedTuple):
    """What a memory-augmented network has after a sequence.

    Fields:
        hidden, cell: the LSTM's state, [units].
        reads: what the heads have read last, [heads, width].
        rows: the memory M, [slots, width].
        addresses: where the heads have read last, w^r, [heads, slots].
        usage: w^u, [slots].
    """

    hidden: Float[Array, " units"]
    cell: Float[Array, " units"]
    reads: Float[Array, "heads width"]
    rows: Float[Array, "slots width"]
    addresses: Float[Array, "heads slots"]
    usage: Float[Array, " slots"]


@final
class MemoryAugmented(SequenceLearner):
    """Few-shot learning by a controller with an external memory, to which it writes where it has read or at what is
    least used.

        h_t = LSTM([h_lam(x_t), y_t, r_{t-1}]),   k_t^i = K_i h_t,   g_t^i = sigmoid(G_i h_t),     heads i
        w_t^{w,i} = g_t^i w_{t-1}^{r,i} + (1 - g_t^i) (one-hot at the i-th least of w_{t-1}^u),
        M_t = M_{t-1}, zero in those least used rows, + sum over i of w_t^{w,i} k_t^i,
        w_t^{r,i} = softmax over rows of scale * cos(k_t^i, M_t),   r_t^i = w_t^{r,i} M_t,
        w_t^u = gamma w_{t-1}^u + sum over i of (w_t^{r,i} + w_t^{w,i}),
        logits(x) = C [h, r] + c   with h and r of one more step, for a query image with y = 0, that writes nothing

    After the support images M is what the task has taught; query images read it, each by itself. The state after that
    is w: L^j(w, lam) = |w - state|^2, w = argmin of L^j.

    Arguments:
        ways: classes an episode.
        statistics: where batch normalisation takes its statistics.
        units: of the LSTM.
        slots, width: of the memory.
        heads: that read and write.
        decay: gamma, from 0 to 1.
        scale: > 0, of the cosines; the paper prints none, that is 1, with which a row of the memory gets at most e^2
            times as much attention as another one and reading is a mean over all `slots`. With 4 training hardly
            leaves chance, and 10 is slower than 20.

    lam is `{"network": module, "controller": LSTM, "keys": K, "gates": G, "output": C}`; `lam` needs `image_shape` and
    `key`.
    Raises: `ValueError` for sizes below 1, fewer slots than heads, a decay outside of [0, 1], a scale that is not
    positive, in `lam` if shape or key are missing, and where lam is for another number of ways.
    Cost: one pass of the network over the episode, N K steps in turn (one more with `offset`) of 4 units (features +
    ways + heads width + units) multiplications for the LSTM and 3 heads slots width for the memory, and a step for each
    query image.
    Reference: Santoro et al. 2016, Sec. 3 and eq. 2-8. There images are pixels and the loss is that of all positions of
    a longer sequence, each asked before its label comes; here h_lam is any network, its features standardised
    (`SequenceLearner`), and the loss is that of the query images. Of several heads the paper says little; here each
    writes its own key, to a least used row of its own.
    Do not use it for its accuracy: metric learners are ahead after far less training; it shows what a memory learns.

    >>> from hyperax.fewshot import PerImage
    >>> learner = MemoryAugmented(5)
    >>> make = lambda key: learner.lam(PerImage(jnp.ravel), (28, 28, 1), key)
    >>> lam = eqx.filter_eval_shape(make, jax.random.key(0))
    >>> images, labels = jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.uint8), jax.ShapeDtypeStruct((5,), jnp.int32)
    >>> learn = lambda lam, images, labels: learner.adapt(lam, images, labels, steps=0)
    >>> eqx.filter_eval_shape(learn, lam, images, labels).w.rows.shape
    (128, 40)
    """

    ways: int
    statistics: Statistics = "set"
    units: int = 200
    slots: int = 128
    width: int = 40
    heads: int = 4
    decay: float = 0.99
    scale: float = 20.0
    offset: bool = False

    def __check_init__(self):
        for name in ("units", "slots", "width", "heads"):
            check_steps(getattr(self, name), name, 1)
        if self.slots < self.heads:
            raise ValueError(
                f"{self.heads} heads write to {self.slots} slots: each needs one of its own, use more slots"
            )
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is {self.decay!r}; it must be from 0 (the last step alone) to 1 (all alike)")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale!r}; it must be positive: 1 is plain cosine similarity")

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        like, key = features_and_key(network, image_shape, key, "MemoryAugmented", "its controller")
        for_controller, *keys = jax.random.split(key, 4)
        read = self.heads * self.width
        linear = lambda inputs, outputs, key: eqx.nn.Linear(inputs, outputs, dtype=like.dtype, key=key)
        features = like.shape[1]
        controller = eqx.nn.LSTMCell(features + self.ways + read, self.units, dtype=like.dtype, key=for_controller)
        # One label against all the features: without the factor the labels are next to nothing of what is written, and
        # training stays at chance for long.
        weight = controller.weight_ih.at[:, features : features + self.ways].multiply(features**0.5)
        return {
            "network": network,
            "controller": eqx.tree_at(lambda cell: cell.weight_ih, controller, weight),
            "keys": linear(self.units, read, keys[0]),
            "gates": linear(self.units, self.heads, keys[1]),
            "output": linear(self.units + read, self.ways, keys[2]),
        }

    def init(self, lam: Any, prepared: OnFeatures) -> Memory:
        """The state after the support set: the images each with its label, or with the label before."""
        there = present(prepared.support_targets)
        images, labels, taken = prepared.support, prepared.support_targets.one_hot * there[:, None], there
        if self.offset:
            # Padding comes first: without its labels, the first image that is there follows none.
            images, labels = jnp.pad(images, ((0, 1), (0, 0))), jnp.pad(labels, ((1, 0), (0, 0)))
            taken = jnp.pad(there, (0, 1), constant_values=True)

        def step(state: Memory, at: tuple[Array, Array, Array]) -> tuple[Memory, None]:
            features, label, is_there = at
            after = self._write(lam, self._control(lam, state, features, label))
            return jax.tree.map(lambda new, old: jnp.where(is_there, new, old), after, state), None

        zeros = lambda *shape: jnp.zeros(shape, prepared.support.dtype)
        heads, slots, width = self.heads, self.slots, self.width
        empty = Memory(
            zeros(self.units),
            zeros(self.units),
            zeros(heads, width),
            zeros(slots, width),
            zeros(heads, slots),
            zeros(slots),
        )
        return jax.lax.scan(step, empty, (images, labels, taken))[0]

    def inner(self, w: Memory, lam: Any, prepared: OnFeatures) -> Array:
        """L: the squared distance of w to the state after the support set."""
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), w, self.init(lam, prepared))
        return jnp.sum(jnp.stack(jax.tree.leaves(squares)))

    def logits(self, w: Memory, lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The answers to the query images: one step each from w, without a label and without writing."""

        def answer(features: Array) -> Array:
            state = self._control(lam, w, features, jnp.zeros(self.ways, features.dtype))
            _, reads = self._read(self._keys(lam, state), state.rows)
            return lam["output"](jnp.concatenate([state.hidden, reads.reshape(-1)]))

        return jax.vmap(answer)(prepared.query)

    def _control(self, lam: Any, state: Memory, features: Array, label: Array) -> Memory:
        """The state with that of the LSTM after its step."""
        inputs = jnp.concatenate([features, label, state.reads.reshape(-1)])
        hidden, cell = lam["controller"](inputs, (state.hidden, state.cell))
        return state._replace(hidden=hidden, cell=cell)

    def _keys(self, lam: Any, state: Memory) -> Float[Array, "heads width"]:
        return lam["keys"](state.hidden).reshape(self.heads, self.width)

    def _read(self, keys: Array, rows: Array) -> tuple[Float[Array, "heads slots"], Float[Array, "heads width"]]:
        """Where and what the heads read."""
        addresses = jax.nn.softmax(self.scale * cosines(keys, rows), axis=1)
        return addresses, addresses @ rows

    def _write(self, lam: Any, state: Memory) -> Memory:
        """The state after writing, then reading; the LSTM has had its step."""
        keys, gates = self._keys(lam, state), jax.nn.sigmoid(lam["gates"](state.hidden))[:, None]
        least = jax.nn.one_hot(jax.lax.top_k(-state.usage, self.heads)[1], self.slots, dtype=keys.dtype)
        writes = gates * state.addresses + (1 - gates) * least
        rows = state.rows * (1 - jnp.sum(least, axis=0))[:, None] + writes.T @ keys
        addresses, reads = self._read(keys, rows)
        usage = self.decay * state.usage + jnp.sum(addresses + writes, axis=0)
        return state._replace(reads=reads, rows=rows, addresses=addresses, usage=usage)
