"""Mini-batches of tensors, data sets and loaders of PyTorch."""

import jax
import numpy as np
import pytest

import hyperax as hx
from torch_network import ht, nn, torch
from torch_problems import close


def test_mini_batches_are_a_function_of_the_step():
    batches = ht.Batches({"x": torch.arange(7), "y": torch.arange(7) * 10}, 3, seed=5)
    seen = [batches(None, t) for t in (1, 2, 3, 4)]
    assert all(torch.equal(batches(None, t)["x"], seen[t - 1]["x"]) for t in (4, 1, 3, 2))
    assert all(torch.equal(b["y"], 10 * b["x"]) for b in seen)
    assert len({*seen[0]["x"].tolist(), *seen[1]["x"].tolist()}) == 6, "an epoch has no repetition"
    assert torch.equal(batches(0, 1)["x"], seen[0]["x"])
    assert not all(torch.equal(batches(1, t)["x"], seen[t - 1]["x"]) for t in (1, 2, 3, 4))
    uneven = ht.Batches(torch.arange(7), 3, drop_last=False)
    assert sorted(x for t in (1, 2, 3) for x in uneven(None, t).tolist()) == list(range(7))
    index, batch = ht.Batches(torch.arange(7) * 2, 3, with_index=True)(None, 1)
    assert torch.equal(batch, 2 * index)
    within = ht.Batches(torch.arange(7.0), 3)
    torch.func.grad(lambda x: x * within(None, 1).sum())(torch.tensor(1.0))
    assert torch.equal(within(None, 2), ht.Batches(torch.arange(7.0), 3)(None, 2)), "an epoch may begin in torch.func"


def test_data_sets_and_loaders():
    pairs = torch.utils.data.TensorDataset(torch.arange(6.0), torch.arange(6))
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)
    batches = ht.Batches(loader)
    sizes = [len(batches(None, t)[0]) for t in (1, 2, 3)]
    assert sizes == [4, 2, 4], "drop_last is the loader's"
    x, y = batches(None, 1)
    assert torch.equal(x.long(), y)
    whole = ht.Batches(pairs)(None, 1)
    assert torch.equal(whole[0], torch.arange(6.0))
    collated = torch.utils.data.DataLoader(pairs, batch_size=2, drop_last=True, collate_fn=lambda pairs: len(pairs))
    assert ht.Batches(collated)(None, 1) == 2

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    for data, size, advice in (
        (Stream(), 2, "no example number i"),
        ((x for x in torch.ones(3)), 2, "no example number i"),
        (torch.utils.data.DataLoader(pairs, batch_size=None), None, "no batch_size"),
        ((torch.ones(3), torch.ones(4)), 2, "leading axes of data differ"),
        (torch.tensor(1.0), None, "data is a number"),
        (5, None, "no example number i"),
        ((torch.ones(3), ["a", "b", "c"]), None, r"data\[1\]\[0\] is a str"),
        ({"x": [1, 2]}, None, "convert them by torch.tensor"),
    ):
        with pytest.raises(ValueError, match=advice):
            ht.Batches(data, size)


def test_numpy_arrays_are_tensors():
    x, y = np.linspace(0, 1, 6, dtype=np.float32)[:, None], np.arange(6)
    found, labels = ht.Batches((x, y), 6)(None, 1)
    assert found.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(found[:, 0], labels.float() / 5)
    run = lambda *data: ht.from_module(
        nn.Linear(1, 1, bias=False).requires_grad_().apply(lambda layer: nn.init.ones_(layer.weight)),
        lambda model, batch: (model(batch["x"])[:, 0] - batch["y"]).pow(2).mean(),
        tune={"step_size": 0.1},
        data=dict(zip("xy", data, strict=True)),
        validation=dict(zip("xy", data, strict=True)),
        batch_size=3,
    )
    a, b = (run(x, y), run(torch.tensor(x), torch.tensor(y)))
    value = lambda run: float(ht.hypergradient(run.problem, hx.Reverse(3))(run.lam).value)
    assert value(a) == value(b)


def test_an_augmenting_data_set_is_replayed():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return torch.tensor([float(i)]) + torch.rand(1)

    module = nn.Linear(1, 1)
    run = ht.from_module(
        module,
        lambda model, x: (model(x) - x).pow(2).mean(),
        tune={"step_size": 0.01},
        data=torch.utils.data.DataLoader(Noisy(), batch_size=3),
        validation=torch.ones(2, 1),
    )
    h, again = (ht.hypergradient(run.problem, hx.Reverse(4, segment=k))(run.lam) for k in (None, 2))
    close(again, float(h.value), jax.tree.leaves(h.grad), 1e-6)


def test_a_sampler_that_chooses_is_refused_and_an_order_is_not():
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

    examples = TensorDataset(torch.arange(10.0))
    for loader in (
        DataLoader(examples, batch_size=2, sampler=SubsetRandomSampler([0, 1, 2, 3])),
        DataLoader(examples, batch_size=2, sampler=RandomSampler(examples, replacement=True)),
        DataLoader(examples, batch_sampler=BatchSampler(SubsetRandomSampler([0, 1]), 2, False)),
    ):
        with pytest.raises(ValueError, match="Subset"):
            ht.Batches(loader, 2)
    assert ht.Batches(DataLoader(examples, batch_size=2, shuffle=True)).in_epoch == 5
    linear = torch.nn.Linear(1, 1)
    loss = lambda model, batch: model(batch[0][:, None]).square().mean()
    more = DataLoader(examples, batch_size=64)
    training = ht.from_module(linear, loss, tune={"step_size": 0.1}, data=examples, validation=more, batch_size=5)
    assert training.problem.outer.examples(None)[0].shape == (10,), (
        "validation is one batch, whatever the loader's size"
    )


def test_a_list_of_pairs_is_a_data_set():
    pairs = [(torch.full((1, 2), float(i)), torch.tensor([i])) for i in range(6)]
    batches = ht.Batches(pairs, 3)
    inputs, targets = batches(None, 1)
    assert batches.count == 6
    assert (inputs.shape, targets.shape) == ((3, 1, 2), (3, 1))


def test_validation_in_mini_batches():
    """E sees some examples, others in each run; over an epoch of runs its mean is near that over all of them."""
    x = torch.arange(12.0)[:, None] / 12
    loss = lambda model, batch: (model(batch) - 1).square().mean()
    torch.manual_seed(0)
    linear = torch.nn.Linear(1, 1)
    made = lambda size: ht.from_module(
        linear, loss, tune={"step_size": 0.1}, data=x, validation=x, validation_batch_size=size
    )
    part, whole = made(4), made(None)
    seen = [part.problem.outer.examples(run).flatten().tolist() for run in (0, 0, 1)]
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) == 4
    assert set(seen[0]) <= set(x.flatten().tolist())
    f, g = (ht.hypergradient(one.problem, hx.Reverse(3)) for one in (part, whole))
    by_hand = ht.from_module(linear, loss, tune={"step_size": 0.1}, data=x, validation=torch.tensor(seen[0])[:, None])
    expected = ht.hypergradient(by_hand.problem, hx.Reverse(3))(by_hand.lam)
    close(f(part.lam, 0), float(expected.value), [float(expected.grad["step_size"])], 1e-6)
    mean = sum(float(f(part.lam, run).grad["step_size"]) for run in range(40)) / 40
    assert mean == pytest.approx(float(g(whole.lam).grad["step_size"]), rel=0.1)
    assert part.identity != whole.identity
    with pytest.raises(ValueError, match="cannot be drawn"):
        made(13)
