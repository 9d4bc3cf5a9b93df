"""Running averages: of a sequence of numbers in closed form, beside a network that is trained as without them."""

import io

import pytest
import torch
from torch import nn

from openmm_cgflow.training.optimisers import RunningAverage


def follow(average, values):
    """Sets the trained parameter to each value in turn; returns what the average is after each."""
    found = []
    for value in values:
        with torch.no_grad():
            average.trained.weight.fill_(value)
        average.update()
        found.append(float(average.average.weight.detach()))
    return found


def network(value=0.0):
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, value)
    return layer


def test_what_is_trained_starts_as_a_copy():
    layer = network(3.0)
    average = RunningAverage(layer, 0.9)
    assert average.average is layer and average.trained is not layer
    assert torch.equal(average.trained.weight, layer.weight)
    with torch.no_grad():
        average.trained.weight.fill_(5.0)
    assert float(layer.weight.detach()) == 3.0  # until the update
    assert not any(parameter.grad is not None for parameter in layer.parameters())


def test_the_average_is_exponential_after_a_short_start():
    values = torch.sin(torch.arange(300, dtype=torch.float64)).tolist()
    expected, found = 0.0, follow(RunningAverage(network(), 0.9), values)
    for n, value in enumerate(values, start=1):
        decay = min(0.9, n / (n + 10))
        expected = decay * expected + (1 - decay) * value
        assert found[n - 1] == pytest.approx(expected, abs=1e-12)


def test_the_start_is_forgotten_and_a_constant_kept():
    found = follow(RunningAverage(network(100.0), 0.995), [1.0] * 60)
    assert abs(found[-1] - 1) < 0.01  # with the decay alone it would be 74
    assert follow(RunningAverage(network(2.0), 0.9), [2.0] * 5) == [2.0] * 5


def test_the_average_is_less_noisy():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator, dtype=torch.float64)
    found = torch.tensor(follow(RunningAverage(network(), 0.98), values.tolist()))[500:]
    assert float(found.std()) == pytest.approx((0.02 / 1.98) ** 0.5, rel=0.2)


def test_gradients_go_to_what_is_trained():
    average = RunningAverage(network(1.0), 0.9)
    average.trained(torch.ones(1, 1).double()).sum().backward()
    assert average.trained.weight.grad is not None and average.average.weight.grad is None
    average.update()
    assert average.average.weight.requires_grad and average.average.weight.grad_fn is None


def test_it_continues_from_its_state():
    first = RunningAverage(network(), 0.95)
    follow(first, [1.0, 2.0, 3.0])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = RunningAverage(network(7.0), 0.95)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert float(second.trained.weight.detach()) == 3.0 and second.n_updates == 3
    assert follow(second, [4.0, 5.0]) == follow(first, [4.0, 5.0])
