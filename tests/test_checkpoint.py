"""A run that is killed and resumed is the run that was not; files that are damaged or another run's are refused."""

import json
import os
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from hyperax.checkpoint import Checkpoint
from hyperax.constraints import Box, Positive
from hyperax.minimize import minimize
from hyperax.problem import Hypergradient
from hyperax.stopping import DivergenceWarning, GradientTolerance, Plateau, Validation


class Remembering:
    """A method with a carry that matters: a moving average of the gradient, and a typed PRNG key."""

    def init(self, lam, data):
        return {"mean": jax.tree.map(jnp.zeros_like, lam), "key": jax.random.key(7), "half": jnp.zeros(2, jnp.bfloat16)}

    def __call__(self, lam, data=None, carry=None):
        f = lambda lam: jnp.sum((lam["a"] - data) ** 2) + jnp.log(lam["b"]) ** 2
        value, grad = jax.value_and_grad(f)(lam)
        key, now = jax.random.split(carry["key"])
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, carry["mean"], grad)
        mean = {**mean, "a": mean["a"] + 0.01 * jax.random.uniform(now)}
        carry = {"mean": mean, "key": key, "half": carry["half"] + 1}
        return Hypergradient(value, mean, None, {"metrics": {"a": lam["a"]}}, carry)


# Shared, so that all runs below share one compilation.
METHOD, OPTIMIZER = Remembering(), optax.adam(optax.cosine_decay_schedule(0.1, 200))
VALIDATION = Validation(lambda lam: (float(jnp.sum(lam["a"] ** 2)), {"b": lam["b"]}), every=9)


def sample(key, data):
    return data + jax.random.uniform(key, data.shape)


def run(checkpoint=None, resume=False, **changes):
    arguments = {
        "data": np.array([1.0, 2.0]),
        "sample": sample,
        "key": jax.random.key(0),
        "optimizer": OPTIMIZER,
        "steps": 60,
        "constraint": {"a": None, "b": Positive()},
        "validation": VALIDATION,
        "dispatch": 16,
        "record_every": 4,
    }
    lam = changes.pop("lam", {"a": jnp.array([3.0, -2.0]), "b": 4.0})
    return minimize(METHOD, lam, checkpoint=checkpoint, resume=resume, **{**arguments, **changes})


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


def assert_same(one, other):
    for x, y in ((one.lam, other.lam), (one.last_lam, other.last_lam), (one.carry, other.carry)):
        assert jax.tree.structure(x) == jax.tree.structure(y)
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            assert a.dtype == b.dtype
            assert bool(jnp.all(a == b))
    for name in ("value", "best", "history", "stopped", "steps"):
        assert getattr(one, name) == getattr(other, name)


class Killed(Exception):
    pass


def kill_at(step):
    def callback(progress):
        if progress.step >= step:
            raise Killed

    return callback


class TestResume:
    @pytest.mark.parametrize("moment", [5, 20, 37, 59])
    def test_bit_for_bit(self, tmp_path, uninterrupted, moment):
        checkpoint = Checkpoint(tmp_path, every=5)
        with pytest.raises(Killed):
            run(checkpoint, callbacks=kill_at(moment))
        assert_same(run(checkpoint, resume=bool(checkpoint.files()) or "auto"), uninterrupted)

    def test_killed_again_and_again(self, tmp_path, uninterrupted):
        checkpoint = Checkpoint(tmp_path, every=3)
        for moment in (4, 14, 15, 33, 40):
            with pytest.raises(Killed):
                run(checkpoint, resume="auto", callbacks=kill_at(moment))
        assert_same(run(checkpoint, resume="auto"), uninterrupted)

    def test_from_a_named_file(self, tmp_path, uninterrupted):
        checkpoint = Checkpoint(tmp_path, every=10, keep=9)
        assert_same(run(checkpoint), uninterrupted)
        with pytest.raises(Killed):
            run(checkpoint, resume="step-00000020.ckpt", callbacks=kill_at(32))
        # What is later than the newest now written belongs to the abandoned future.
        assert [file.name for file in checkpoint.files()] == [f"step-000000{k}0.ckpt" for k in (1, 2, 3)]
        assert_same(run(checkpoint, resume=True), uninterrupted)

    def test_a_finished_run_is_returned_and_may_be_extended(self, tmp_path, uninterrupted):
        checkpoint = Checkpoint(tmp_path, every=25)
        run(checkpoint, steps=36)
        assert run(checkpoint, resume=True, steps=36).timings == []
        assert_same(run(checkpoint, resume=True), uninterrupted)

    @pytest.mark.parametrize(
        ("rules", "begins"),
        [
            ({"callbacks": Plateau(2)}, "plateau"),
            ({"callbacks": GradientTolerance(0.5)}, "gradient tolerance"),
            ({"validation": Validation(VALIDATION.function, every=9, patience=2)}, "patience"),
        ],
    )
    def test_rules_decide_as_without_a_kill(self, tmp_path, rules, begins):
        alone = run(steps=400, **rules)
        assert alone.stopped.startswith(begins)
        checkpoint = Checkpoint(tmp_path, every=3)
        killed = {**rules, "callbacks": [kill_at(alone.steps - 5), *np.atleast_1d(rules.get("callbacks", []))]}
        with pytest.raises(Killed):
            run(checkpoint, steps=400, **killed)
        for _ in range(2):  # finished by the first call; the second asks the rules again
            assert_same(run(checkpoint, resume=True, steps=400, **rules), alone)
        longer = run(checkpoint, resume=True, steps=alone.steps + 4, callbacks=(), validation=VALIDATION)
        assert longer.steps == alone.steps + 4

    def test_after_divergence_with_a_smaller_step(self, tmp_path):
        checkpoint = Checkpoint(tmp_path, every=1)
        with pytest.warns(DivergenceWarning):
            diverged = run(checkpoint, optimizer=optax.sgd(300.0))
        resumed = run(checkpoint, resume=checkpoint.files()[0].name, optimizer=optax.sgd(1e-3))
        assert resumed.steps == 60 > diverged.steps

    def test_old_files_are_removed(self, tmp_path):
        (tmp_path / "step-00000003.unfinished").write_bytes(b"left by a kill")
        run(Checkpoint(tmp_path, every=7, keep=3))
        assert sorted(file.name for file in tmp_path.iterdir()) == [f"step-000000{k}.ckpt" for k in (49, 56, 60)]


class TestRefusals:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        checkpoint = Checkpoint(tmp_path, every=20, keep=3, identity={"seed": 0, "sizes": (2, 3)})
        run(checkpoint)
        return checkpoint

    @pytest.mark.parametrize("length", [0, 30, 400, -1000, -1])
    def test_truncated(self, checkpoint, length, uninterrupted):
        last = checkpoint.files()[-1]
        last.write_bytes(last.read_bytes()[:length])
        with pytest.raises(ValueError, match=r'step-00000060.ckpt is damaged .* use resume="step-00000040.ckpt"'):
            run(checkpoint, resume=True)
        assert_same(run(checkpoint, resume="step-00000040.ckpt"), uninterrupted)

    def test_one_bit_flipped_in_two_files(self, checkpoint):
        for file, place in zip(checkpoint.files()[1:], (-9, 300), strict=True):
            content = bytearray(file.read_bytes())
            content[place] ^= 1
            file.write_bytes(content)
        with pytest.raises(ValueError, match=r'is damaged .* use resume="step-00000020.ckpt"'):
            run(checkpoint, resume=True)

    def test_no_good_one_left(self, checkpoint):
        for file in checkpoint.files():
            file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(ValueError, match="No good one is left"):
            run(checkpoint, resume=True)

    def test_garbage(self, checkpoint):
        checkpoint.files()[-1].write_bytes(os.urandom(1000))
        with pytest.raises(ValueError, match="is not a hyperax checkpoint"):
            run(checkpoint, resume=True)

    def test_another_version(self, checkpoint):
        last = checkpoint.files()[-1]
        last.write_bytes(last.read_bytes().replace(b"checkpoint 1 ", b"checkpoint 2 ", 1))
        with pytest.raises(ValueError, match="has format version 2 and this hyperax reads 1"):
            run(checkpoint, resume=True)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lam": {"a": jnp.zeros(3), "b": 4.0}}, r"leaves.best.a is 'float64\[2\]' there and 'float64\[3\]' here"),
            ({"lam": {"a": jnp.zeros(2, jnp.float32), "b": 4.0}}, r"float64\[2\]' there and 'float32\[2\]' here"),
            ({"optimizer": optax.sgd(0.1)}, r"leaves.state.optimizer\S+ is .* there and absent here"),
            ({"key": jax.random.key(1)}, r"settings.key is \[0, 0\] there and \[0, 1\] here"),
            ({"record_every": 2}, r"settings.record_every is 4 there and 2 here"),
            ({"validation": None}, r"settings.validation_every is 9 there and None here"),
            ({"constraint": {"a": None, "b": Box(0, 9)}}, r"settings.constraint\S* is .* there and .*Box"),
            ({"steps": 59}, "at step 60, past steps=59; raise steps"),
            ({"resume": "step-00000050.ckpt"}, r"no checkpoint 'step-00000050.ckpt' in .*step-00000040.ckpt"),
            ({"resume": False}, r"already holds a run \(step-00000060.ckpt\); pass resume=True"),
        ],
    )
    def test_foreign(self, checkpoint, changes, message):
        changes = {"data": jnp.ones(3) if "[3]" in message else np.ones(2), "resume": True, **changes}
        with pytest.raises(ValueError, match=message):
            run(checkpoint, **changes)

    def test_another_identity(self, checkpoint):
        other = Checkpoint(checkpoint.directory, every=20, identity={"seed": 1, "sizes": (2, 3)})
        with pytest.raises(ValueError, match=r"belongs to another run: identity.seed is 0 there and 1 here"):
            run(other, resume=True)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="count from 1"):
            Checkpoint("runs", every=0)
        with pytest.raises(ValueError, match="JSON values"):
            Checkpoint("runs", every=1, identity={"data": object()})


def descend(directory, pause):
    def hypergradient(lam, data, carry):
        value, grad = jax.value_and_grad(lambda lam: jnp.sum((jnp.sin(lam) - data) ** 2))(lam)
        return Hypergradient(value, grad, None, {}, carry)

    solution = minimize(
        hypergradient,
        jnp.linspace(-1.0, 1.0, 5),
        data=0.1,
        sample=lambda key, data: data * jax.random.uniform(key, (5,)),
        key=jax.random.key(0),
        optimizer=optax.adam(0.05),
        steps=300,
        record_every=2,
        validation=Validation(lambda lam: float(jnp.sum(lam**2)), every=25),
        checkpoint=Checkpoint(directory, every=2),
        resume="auto",
        callbacks=lambda progress: time.sleep(pause),
    )
    return json.dumps([[x.hex() for x in solution.lam.tolist()], solution.history, solution.best])


def descend_here(directory, pause):
    jax.config.update("jax_enable_x64", True)
    print(descend(directory, pause))


def test_a_process_killed_at_random_moments(tmp_path):
    log = tmp_path / "said.log"
    start = lambda pause: tiny.begin(log, tmp_path, descend_here, tmp_path / "killed", pause)
    chance, survived = random.Random(), 0
    checkpoint = Checkpoint(tmp_path / "killed", every=2)
    for _ in range(2):
        before, process = checkpoint.files(), start(pause=0.005)
        deadline = time.monotonic() + 60
        while checkpoint.files() == before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.join()
        survived += process.exitcode == 0
    assert survived < 2  # at least one of them was killed in the middle
    last = start(pause=0)
    uninterrupted = descend(tmp_path / "reference", 0)
    last.join(60)
    assert json.loads(log.read_text()) == json.loads(uninterrupted)
