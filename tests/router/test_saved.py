import json
from dataclasses import replace

import pytest
import torch

from moqe.errors import CheckpointError
from moqe.recipe import Balance
from moqe.router import GuardedRouter, fit_baselines, load_router, save_router
from moqe.router.domain_classifier import fit_domain_classifier
from moqe.router.network_router import NetworkRouter
from moqe.router.text_network import TextNetwork
from moqe.router.training import TrainingOptions, train_network


@pytest.fixture(scope="module")
def routers(planted):
    train, validation = planted(40, 0.1, 1), planted(20, 0.1, 2)
    options = TrainingOptions("cross_entropy", 1, 8, 2, 1e-3, 0.01, balance=Balance())
    network, _ = train_network(lambda: TextNetwork(16, 3, width=8, segment=2), train, validation, options, 0, "paper")
    baselines = fit_baselines(train, validation, 7)
    labelled = [replace(one, label=tuple("ab"[row % 2] for row in range(len(one)))) for one in (train, validation)]
    baselines |= {"domain-classifier": fit_domain_classifier(*labelled)}
    return baselines | {"paper": network, "guarded": GuardedRouter(baselines["linear"], 2, 0.0123)}


@pytest.mark.parametrize(
    "name", ["constant", "random", "uniform", "linear", "knn", "logistic", "domain-classifier", "paper", "guarded"]
)
def test_a_saved_router_predicts_the_same_and_has_the_same_bytes(routers, planted, tmp_path, name):
    router, test = routers[name], planted(30, 0.1, 3)
    save_router(router, tmp_path / "one")
    state = torch.random.get_rng_state()
    again = load_router(tmp_path / "one")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again.predict(test.features), router.predict(test.features))
    assert (again.name, again.unit) == (router.name, router.unit)
    save_router(again, tmp_path / "two")
    for file in ("router.json", "router.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["router.json", "router.safetensors"]


def test_embeddings_are_not_stored(routers, tmp_path):
    save_router(routers["paper"], tmp_path)
    assert isinstance(routers["paper"], NetworkRouter)
    assert (tmp_path / "router.safetensors").stat().st_size < 90 * 16 * 4 + 30_000
    assert not any("embedding" in name for name in routers["paper"].tensors())


def test_damage_is_noticed(routers, tmp_path):
    save_router(routers["linear"], tmp_path)
    content = bytearray((tmp_path / "router.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "router.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or of another router"):
        load_router(tmp_path)
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_router(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "has format 1"),
        ({"kind": "liner"}, "did you mean 'linear'"),
        ({"options": {}}, "does not describe a router"),
        ({"kind": "network"}, "does not describe a router"),
        ({"guard": {"fallback": 1}}, "does not describe a router"),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(routers, tmp_path, change, message):
    save_router(routers["linear"], tmp_path)
    description = json.loads((tmp_path / "router.json").read_text()) | change
    (tmp_path / "router.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=message):
        load_router(tmp_path)


def test_an_unknown_network_is_an_error(routers, tmp_path):
    save_router(routers["paper"], tmp_path)
    path = tmp_path / "router.json"
    path.write_text(path.read_text().replace('"kind": "text"', '"kind": "texture"'))
    with pytest.raises(CheckpointError, match="did you mean 'text'"):
        load_router(tmp_path)


def test_a_router_of_an_unknown_class_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="of class object cannot be saved"):
        save_router(object(), tmp_path)
