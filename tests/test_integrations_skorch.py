"""The skorch callback: a run on digits, resumed from skorch's checkpoint."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import learnsched as ls
from learnsched.data import load

pytest.importorskip("skorch")

from sklearn.base import clone
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint, LoadInitState

from learnsched.integrations.skorch import QuantizationCallback

EPOCHS = 6
DATA = load("digits")
X, Y = DATA.train.x.flatten(1).numpy(), DATA.train.y.numpy()


class Network(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10), nn.Softmax(-1),
        )  # fmt: skip
        ls.quantize_(self, ls.ternary(), ls.unsigned(2))

    def forward(self, x):
        return self.layers(x)


def net(*others, epochs=EPOCHS, **options):
    callback = QuantizationCallback(ls.load_pretrained("default"), epochs=EPOCHS, **options)
    return NeuralNetClassifier(
        Network, callbacks=[callback, *others], max_epochs=epochs, optimizer=torch.optim.Adam,
        lr=0.01, batch_size=100, verbose=0, train_split=None,
    )  # fmt: skip


def test_a_run_on_digits_learns_and_ends_on_the_levels():
    model = net().fit(X, Y)
    scheduler = model.quantization_
    assert scheduler.epoch == EPOCHS
    assert [m["train_loss"] for m in scheduler.history.metrics] == model.history[:, "train_loss"]
    assert scheduler.state_dict()["steps_per_epoch"] == 10
    ls.finalize_(model.module_, [torch.from_numpy(X)])
    ls.integer_weights(model.module_)
    accuracy = (model.predict(DATA.test.x.flatten(1).numpy()) == DATA.test.y.numpy()).mean()
    assert accuracy > 0.8


def test_a_run_resumed_from_skorchs_checkpoint_equals_the_uninterrupted_one(tmp_path):
    def saved(epochs):
        checkpoint = Checkpoint(
            monitor=None, dirname=str(tmp_path), f_quantization="quantization.pt"
        )
        return net(LoadInitState(checkpoint), checkpoint, epochs=epochs)

    whole = net().fit(X, Y)
    saved(2).fit(X, Y)
    resumed = saved(EPOCHS - 2).fit(X, Y)
    assert resumed.quantization_.epoch == EPOCHS
    for (name, a), b in zip(
        whole.module_.state_dict().items(), resumed.module_.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    history = whole.quantization_.history
    assert torch.equal(history.schedule.table, resumed.quantization_.history.schedule.table)


def test_training_goes_on_with_partial_fit_and_starts_anew_with_fit():
    model = net(epochs=3).fit(X, Y)
    model.partial_fit(X, Y)
    assert model.quantization_.epoch == EPOCHS
    with pytest.raises(RuntimeError, match="for a horizon of 6 epochs"):
        model.partial_fit(X, Y)
    model.fit(X, Y)
    assert model.quantization_.epoch == 3


def test_a_net_can_be_cloned_and_pickled():
    model = clone(net(seed=5, fine_tuning=True))
    assert (model.callbacks[0].seed, model.callbacks[0].fine_tuning) == (5, True)
    model.max_epochs = 1
    model.fit(X[:200], Y[:200])
    twin = pickle.loads(pickle.dumps(model))
    assert np.array_equal(twin.predict_proba(X[:5]), model.predict_proba(X[:5]))


def test_a_module_that_is_made_anew_gets_a_scheduler_of_its_own():
    model = net(epochs=2).fit(X[:200], Y[:200])
    first = model.quantization_
    model.partial_fit(X[:200], Y[:200])
    assert model.quantization_ is first and first.epoch == 4
    model.set_params(module__width=12)
    model.partial_fit(X[:200], Y[:200])
    second = model.quantization_
    assert second is not first and second.epoch == 2
    share = model.module_.layers[0].weight_quantizer.membership.count_nonzero()
    assert share == round(second.get_last_setting()[0].fraction * 64 * 12)


def test_a_new_optimizer_is_watched():
    model = net(epochs=EPOCHS - 1).fit(X[:200], Y[:200])
    before = model.optimizer_
    model.initialize_optimizer()
    assert model.optimizer_ is not before
    held = model.module_.layers[0].weight_quantizer
    assert held.membership.any()
    model.partial_fit(X[:200], Y[:200], epochs=1)
    weight = model.module_.layers[0].weight
    frozen = held.membership == 1
    assert torch.equal(weight[frozen], held.held[frozen])
