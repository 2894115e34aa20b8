import math

import pytest
import torch
from torch import nn

from moqe.router.image_network import BasicBlock, BatchNorm, ImageNetwork, PositionAttention, SqueezeExcitation
from moqe.router.mlp_network import MlpNetwork


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_papers_size():
    mlp = 2048 * 1024 + 1024 * 128 + 128 * 1024 + 3 * (1024 + 128 + 1024)  # weights; biases and normalisation
    entry = 9 * 16 * 16 + 2 * 16
    stages = 0
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        stages += 9 * inputs * outputs + 9 * outputs**2 + 4 * outputs  # two convolutions with normalisation
        stages += 2 * outputs * (outputs // 16) + outputs // 16 + outputs  # squeeze and excitation
        stages += 0 if inputs == outputs else inputs * outputs + 2 * outputs  # the shortcut
    attention = 4 * 64 * 64 + 4 * 64 + 1
    network = ImageNetwork(2048, 4)
    assert parameters(network) == mlp + entry + stages + attention + 64 * 4 + 4
    convolutions = [
        module for module in network.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    assert len(convolutions) + 1 == 8  # with the last linear layer: SE-ResNet-8


def test_the_shapes_on_the_way():
    network, shapes = ImageNetwork(2048, 4), {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape)}))
    network(torch.randn(3, 2048))
    assert [shapes[f"mlp.{i}"] for i in (2, 5, 8)] == [(3, 1024), (3, 128), (3, 1024)]
    assert shapes["entry"] == (3, 16, 8, 8)
    assert [shapes[f"stages.{i}"] for i in range(3)] == [(3, 16, 8, 8), (3, 32, 4, 4), (3, 64, 2, 2)]
    assert shapes["attention"] == (3, 4, 64)
    assert shapes[""] == (3, 4)


@pytest.mark.parametrize("make", [ImageNetwork, MlpNetwork])
@pytest.mark.parametrize("dimension", [16, 2048])
def test_logits_in_evaluation_are_deterministic_and_the_same_for_each_sample_alone(make, dimension):
    torch.manual_seed(0)
    network = make(dimension, 3)
    network(torch.randn(32, dimension))  # moves the running statistics
    network.eval()
    x = torch.randn(4, dimension)
    with torch.no_grad():
        together = network(x)
        assert together.shape == (4, 3)
        assert torch.equal(together, network(x))
        torch.testing.assert_close(together[2:3], network(x[2:3]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [ImageNetwork, MlpNetwork])
def test_a_batch_of_one_can_be_trained_on(make):
    torch.manual_seed(0)
    network = make(16, 3)
    before = {name: value.clone() for name, value in network.named_buffers() if value.dim() == 1}
    loss = network(torch.randn(1, 16)).square().sum()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    for name, value in network.named_buffers():
        if "mlp" in name and value.dim() == 1:  # of vectors; a map has more than one value per channel
            assert torch.equal(value, before[name])


def test_batch_normalisation_is_the_usual_one_for_two():
    torch.manual_seed(0)
    mine, usual = BatchNorm(5), nn.BatchNorm1d(5)
    x = torch.randn(2, 5)
    assert torch.equal(mine(x), usual(x))
    assert torch.equal(mine.running_mean, usual.running_mean)


def test_attention_by_hand():
    torch.manual_seed(0)
    assert ImageNetwork(16, 3).attention.heads == 8
    attention = PositionAttention(64, 8)
    attention.log_temperature.data.fill_(math.log(2.0))
    x = torch.randn(1, 4, 64)
    query, key, value = attention.query_key_value(x[0]).chunk(3, 1)
    heads = []
    for part in (slice(8 * i, 8 * i + 8) for i in range(8)):
        scores = query[:, part] @ key[:, part].T / math.sqrt(8) / 2.0
        heads.append(scores.softmax(1) @ value[:, part])
    torch.testing.assert_close(attention(x)[0], attention.projection(torch.cat(heads, 1)), atol=1e-5, rtol=1e-4)


def test_the_temperature_starts_at_one_and_learns():
    torch.manual_seed(0)
    network = ImageNetwork(16, 3)
    assert network.attention.log_temperature.item() == 0.0
    network(torch.randn(8, 16)).square().sum().backward()
    assert float(network.attention.log_temperature.grad.abs()) > 0


def test_squeeze_and_excitation_scales_channels():
    torch.manual_seed(0)
    module = SqueezeExcitation(32)
    assert module.squeeze.out_features == 2
    x = torch.rand(2, 32, 3, 3) + 0.5
    ratio = (module(x) / x).detach()
    assert float(ratio.std((2, 3)).max()) < 1e-6
    assert 0 < float(ratio.min()) < float(ratio.max()) < 1


def test_a_block_of_one_shape_has_a_plain_shortcut():
    block = BasicBlock(16, 16, 1).eval()
    for parameter in block.body.parameters():
        parameter.data.zero_()
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("network", [ImageNetwork(16, 3), MlpNetwork(16, 3, width=8, dropout=0.0)])
def test_options_build_the_same_network(network):
    again = type(network)(**network.options)
    assert [p.shape for p in again.parameters()] == [p.shape for p in network.parameters()]


def test_the_small_network_does_not_mind_the_features_scale():
    torch.manual_seed(0)
    network = MlpNetwork(16, 3, dropout=0.0)
    x = torch.randn(64, 16)
    torch.testing.assert_close(network(x), network(1000.0 * x + 7.0), atol=1e-3, rtol=1e-3)
