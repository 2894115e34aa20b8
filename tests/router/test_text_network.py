import pytest
import torch

from moqe.errors import RecipeError
from moqe.router.text_network import EncoderLayer, SelfAttention, TextNetwork, average_segments


def test_the_papers_size():
    network = TextNetwork(576, 5)
    layer = (
        4 * 576**2 + 4 * 576 + 4 * 576**2 + 3 * 576 + 4 * 576
    )  # attention, feed-forward of twice the width, two norms
    attention = 4 * 576**2 + 4 * 576
    head = 576 * 288 + 288 + 288 * 5 + 5
    assert sum(p.numel() for p in network.parameters()) == 2 * layer + attention + 2 * 576 + head


def test_logits_in_evaluation_are_deterministic_and_the_same_for_each_sample_alone():
    torch.manual_seed(0)
    network = TextNetwork(16, 3).eval()
    x = torch.randn(4, 7, 16)
    with torch.no_grad():
        together = network(x)
        assert together.shape == (4, 3)
        assert torch.equal(together, network(x))
        torch.testing.assert_close(together[2:3], network(x[2:3]))


def test_dropout_works_in_training():
    torch.manual_seed(0)
    network = TextNetwork(16, 3)
    x = torch.randn(2, 7, 16)
    assert not torch.equal(network(x), network(x))


def test_the_layers_start_from_different_weights():
    torch.manual_seed(0)
    first, second = TextNetwork(16, 3).encoder
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_only_the_first_tokens_are_read():
    torch.manual_seed(0)
    network = TextNetwork(16, 3, max_tokens=5).eval()
    x = torch.randn(2, 9, 16)
    changed = x.clone()
    changed[:, 5:] = 0.0
    with torch.no_grad():
        assert torch.equal(network(x), network(changed))
        assert not torch.equal(network(x), network(torch.zeros_like(x)))


def test_attention_by_hand():
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, 0.5).eval()
    x = torch.randn(1, 3, 8)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        query, key, value = (part(x[0])[:, head] for part in (attention.query, attention.key, attention.value))
        heads.append((query @ key.T / 2.0).softmax(1) @ value)  # sqrt(8 / 2) = 2
    torch.testing.assert_close(attention(x)[0], attention.projection(torch.cat(heads, 1)))


def test_a_layer_computes_in_training_what_torchs_computes():
    torch.manual_seed(0)
    layer = EncoderLayer(16, 4, 0.0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 7, 16)
    assert layer.training
    torch.testing.assert_close(layer(x), torch.nn.TransformerEncoderLayer.forward(layer, x))
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_a_layer_drops_on_weights_outputs_and_within_the_feed_forward():
    torch.manual_seed(0)
    layer = EncoderLayer(32, 4, 0.5)
    own, torchs = (
        torch.stack([forward(torch.ones(64, 16, 32).cumsum(1).sin()).detach() for _ in range(40)]).std(0).mean()
        for forward in (layer, lambda x: torch.nn.TransformerEncoderLayer.forward(layer, x))
    )
    torch.testing.assert_close(own, torchs, rtol=0.01, atol=0.0)


def test_segments_are_means_of_runs():
    x = torch.arange(10.0).view(1, 5, 2)
    torch.testing.assert_close(average_segments(x, 2), torch.tensor([[[1.0, 2.0], [5.0, 6.0], [8.0, 9.0]]]))
    assert torch.equal(average_segments(x, 5), x.mean(1, keepdim=True))
    assert torch.equal(average_segments(x, 8), x.mean(1, keepdim=True))


def test_heads_that_do_not_divide_the_width_are_an_error():
    with pytest.raises(RecipeError, match=r"router\.heads \(5\) must divide the router's width \(16\)"):
        TextNetwork(16, 3, heads=5)


def test_options_build_the_same_network():
    network = TextNetwork(16, 3, layers=1, width=8, segment=2, heads=2)
    again = TextNetwork(**network.options)
    assert [p.shape for p in again.parameters()] == [p.shape for p in network.parameters()]
