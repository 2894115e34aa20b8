"""Layers, blocks and folding, found by running networks of several shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from moqe.errors import ModelError
from moqe.models.classifier import Logits
from moqe.models.convolutions import blocks, fold_batch_norms, observe_layers


class Block(nn.Module):
    """A residual block whose shortcut has no parameters (option A): every second pixel, zeros for new channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.new = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.new:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return functional.relu(y + x)


class Small(nn.Module):
    """The CIFAR form with two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer2(self.layer1(x)).mean((2, 3)))


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and factors of batch norms as training leaves them, and not zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.2, generator=generator)
    return network.eval()


def images(size: int = 16, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def sequence(*modules: nn.Module) -> nn.Module:
    """A classifier of some modules on 4 channels."""
    return randomised(nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5)))


def hf_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck", num_labels=7)
    return randomised(Logits(ResNetForImageClassification(config)))


def hf_mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return randomised(Logits(MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, num_labels=5))))


@pytest.mark.parametrize(
    ("network", "pairs"),
    [(randomised(Small()), 9), (hf_resnet(), 15), (hf_mobilenet(), 52)],
    ids=["cifar", "resnet", "mobile"],
)
def test_every_normalisation_after_a_convolution_is_folded(network, pairs):
    example = images(64)
    before = copy.deepcopy(network.state_dict())
    folded = fold_batch_norms(network, example)
    assert len(folded.pairs) == pairs
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.network.modules())
    assert folded.max_difference < 1e-4
    other = images(64, seed=1)
    assert torch.allclose(folded.network(other), network(other), atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), st.integers(0, 99), st.sampled_from([(1, 0), (3, 1)]))
def test_folding_grouped_and_depthwise_convolutions(groups, bias, affine, seed, kernel):
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 8, kernel[0], padding=kernel[1], groups=groups, bias=bias)
    network = sequence(nn.Conv2d(3, 4, 3), conv, nn.BatchNorm2d(8, affine=affine), nn.ReLU(inplace=True))
    network(images())
    folded = fold_batch_norms(network, images())
    assert folded.pairs == (("1", "2"),)
    assert isinstance(folded.network[2], nn.Identity)
    assert torch.allclose(folded.network(images(seed=5)), network(images(seed=5)), atol=1e-5)


class NormAct(nn.BatchNorm2d):
    """A normalisation with its activation inside, as timm has them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def test_an_activation_inside_a_normalisation_stays():
    network = sequence(nn.Conv2d(3, 4, 3), NormAct(4))
    network(images())
    folded = fold_batch_norms(network, images())
    assert folded.pairs == (("0", "1"),)
    assert torch.allclose(folded.network(images()), network(images()), atol=1e-5)
    assert observe_layers(folded.network, images())[1].input_nonnegative


class Odd(nn.Module):
    """Two convolutions and a normalisation, put together by a function."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)
        self._forward = forward
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._forward(self, x).mean((2, 3)))


def read_twice(m: Odd, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.norm(y) + y


def written_to(m: Odd, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :1] = 0
    return m.norm(y)


def normalised_first(m: Odd, x: Tensor) -> Tensor:
    return m.b(m.norm(functional.relu(m.a(x))))


@pytest.mark.parametrize("forward", [read_twice, written_to, normalised_first])
def test_what_is_not_a_pair_stays(forward):
    network = Odd(forward)
    folded = fold_batch_norms(network, images())
    assert folded.pairs == ()
    assert folded.max_difference == 0


def test_a_shared_normalisation_cannot_be_folded():
    network = Odd(lambda m, x: m.norm(m.b(m.norm(m.a(x)))))
    with pytest.raises(ModelError, match="norm runs 2 times for one input, so norm cannot be folded into a"):
        fold_batch_norms(network, images())


def test_a_normalisation_without_statistics_cannot_be_folded():
    network = sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    network(images())
    with pytest.raises(ModelError, match="1 keeps no running statistics"):
        fold_batch_norms(network, images())


class Secretive(nn.Conv2d):
    """A convolution that standardises its weight, so that scaling it has no effect."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight / self.weight.norm(), self.bias)


def test_folding_is_checked_on_logits():
    network = sequence(Secretive(3, 4, 3), nn.BatchNorm2d(4))
    network(images())
    with pytest.raises(ModelError, match="moved a logit by"):
        fold_batch_norms(network, images())


def test_layers_in_the_order_in_which_they_run():
    network = fold_batch_norms(randomised(Small()), images()).network
    sites = observe_layers(network, images())
    assert [site.name for site in sites] == [
        "conv1",
        *(f"layer{layer}.{block}.conv{conv}" for layer in (1, 2) for block in (0, 1) for conv in (1, 2)),
        "linear",
    ]
    named = {site.name: site for site in sites}
    assert [site.name for site in sites if not site.input_nonnegative] == ["conv1"]
    assert named["conv1"].weight_shape == (8, 3, 3, 3)
    assert named["layer2.0.conv1"].input_shape == (8, 16, 16)
    assert (named["linear"].kind, named["linear"].weight_shape, named["linear"].input_shape) == (
        "linear",
        (10, 16),
        (16,),
    )


def test_outputs_that_an_addition_reads_are_quantized_at_once():
    network = fold_batch_norms(randomised(Small()), images()).network
    needing = [site.name for site in observe_layers(network, images()) if site.needs_output]
    # The first convolution's output reaches the first addition through a ReLU only.
    assert needing == ["conv1", *(f"layer{layer}.{block}.conv2" for layer in (1, 2) for block in (0, 1))]


@pytest.mark.parametrize(
    ("between", "needed"),
    [
        ((), False),
        ((nn.ReLU(),), False),
        ((nn.ReLU(inplace=True),), False),
        ((nn.ReLU6(), nn.ZeroPad2d(1), nn.MaxPool2d(2)), False),
        ((nn.Identity(), nn.Dropout(0.5)), False),
        ((nn.Hardtanh(-1, 1),), True),
        ((nn.SiLU(),), True),
        ((nn.AvgPool2d(2),), True),
        ((nn.BatchNorm2d(4), nn.ReLU()), True),
    ],
    ids=str,
)
def test_what_lies_between_two_layers_decides(between, needed):
    network = sequence(nn.Conv2d(3, 4, 3), *between, nn.Conv2d(4, 4, 3))
    network(images())
    first, second, last = observe_layers(network, images())
    assert first.needs_output is needed
    assert second.needs_output  # a mean reads it
    assert not last.needs_output  # logits are the end


@pytest.mark.parametrize(
    ("between", "nonnegative"),
    [
        ((nn.ReLU(),), True),
        ((nn.Sigmoid(),), True),
        ((nn.SiLU(),), False),
        ((), False),
        ((nn.ReLU(), nn.AvgPool2d(2)), True),
    ],
    ids=str,
)
def test_inputs_that_are_never_negative(between, nonnegative):
    network = sequence(nn.Conv2d(3, 4, 3), *between, nn.Conv2d(4, 4, 3))
    network(images())
    assert observe_layers(network, images())[1].input_nonnegative is nonnegative


def test_an_input_that_only_the_example_leaves_positive_may_be_negative():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 4 * 4, 5)).eval()
    nn.init.ones_(network[0].weight)
    nn.init.zeros_(network[0].bias)
    assert not observe_layers(network, torch.ones(2, 3, 4, 4))[1].input_nonnegative


class Attending(nn.Module):
    """Projections kept as one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Parameter(torch.randn(12, 12)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.linear(x.flatten(1)[:, :12], self.qkv))


def shared() -> nn.Module:
    network = sequence(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    network(images())
    network[1].weight = network[0].weight
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Odd(lambda m, x: m.b(m.b(m.a(x)))), "b runs 2 times for one input"),
        (shared(), "0 and 1 share one weight"),
        (Attending(), "qkv is multiplied by linear in Attending, outside nn.Conv2d and nn.Linear"),
        (
            nn.Sequential(nn.Conv1d(3, 3, 1), nn.Flatten(), nn.Linear(48, 5)),
            "0.weight is multiplied by conv1d in 0, outside",
        ),
        (
            nn.Sequential(Secretive(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
            r"0 \(Secretive\) does not use its weight as it is",
        ),
    ],
    ids=["twice", "shared", "bare", "conv1d", "changed"],
)
def test_networks_whose_layers_cannot_be_quantized_one_by_one(network, message):
    example = (
        images()[:, :, 0]
        if isinstance(network[0] if isinstance(network, nn.Sequential) else 0, nn.Conv1d)
        else images()
    )
    with pytest.raises(ModelError, match=message):
        observe_layers(network.eval(), example)


def test_a_network_that_fails_says_how():
    with pytest.raises(ModelError, match=r"Sequential cannot run on images of shape \(2, 3, 2, 2\) .*check the prep"):
        observe_layers(nn.Sequential(nn.Conv2d(3, 4, 5)), images(2))


def test_residual_blocks_with_their_additions():
    assert blocks(randomised(Small()), images()) == (
        "conv1",
        "layer1.0",
        "layer1.1",
        "layer2.0",
        "layer2.1",
        "linear",
    )
    encoder = "model.resnet.encoder.stages"
    assert blocks(hf_resnet(), images(64)) == (
        "model.resnet.embedder.embedder.convolution",
        *(f"{encoder}.{stage}.layers.{layer}" for stage in (0, 1) for layer in (0, 1)),
        "model.classifier.1",
    )
    found = blocks(hf_mobilenet(), images(64))
    assert found[:3] == (
        "model.mobilenet_v2.conv_stem",
        "model.mobilenet_v2.layer.0",
        "model.mobilenet_v2.layer.1",
    )
    assert found[-2:] == ("model.mobilenet_v2.conv_1x1.convolution", "model.classifier")


def test_a_block_is_not_widened_over_what_lies_before_it():
    stage = nn.Sequential(nn.Conv2d(8, 8, 1), Block(8, 8, 1))
    network = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), stage, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert blocks(network, images()) == ("0", "1.0", "1.1")


@pytest.mark.parametrize(
    "network", [randomised(Small()), hf_resnet(), hf_mobilenet()], ids=["cifar", "resnet", "mobile"]
)
def test_every_layer_is_in_exactly_one_block(network):
    found = blocks(network, images(64))
    for site in observe_layers(network, images(64)):
        assert sum(site.name == block or site.name.startswith(block + ".") for block in found) == 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))
    network = randomised(getattr(models, name)())
    folded = fold_batch_norms(network, images(64))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.network.modules())
    assert len(observe_layers(folded.network, images(64))) == len(folded.pairs) + 1


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_050"])
def test_timm(name):
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    network = randomised(timm.create_model(name))
    folded = fold_batch_norms(network, images(64))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.network.modules())
    assert len(observe_layers(folded.network, images(64))) == len(folded.pairs) + 1
