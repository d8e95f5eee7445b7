"""The Lightning callback: a run on digits, resumed from Lightning's checkpoints."""

import warnings

import pytest
import torch
from digits_network import digits_layers
from torch.nn import functional as F

import learnsched as ls
from learnsched.data import load

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging  # noqa: E402

from learnsched.integrations.lightning import QuantizationCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|log_every_n_steps|val_dataloader|using `ckpt_path`)"
)

EPOCHS = 6
DATA = load("digits")


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = digits_layers()
        ls.quantize_(self, ls.ternary(), ls.unsigned(2))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, index):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log("valid_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(split):
    data = torch.utils.data.TensorDataset(split.x, split.y)
    return torch.utils.data.DataLoader(data, batch_size=100)


def trainer(folder, *others, callback=None, **options):
    callback = callback or QuantizationCallback(ls.load_pretrained("default"))
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback, *others],
        enable_checkpointing=bool(others), **{"max_epochs": EPOCHS, **options},
    ), callback  # fmt: skip


def fit(folder, *others, validation=False, resume=None, **options):
    model = Digits()
    run, callback = trainer(folder, *others, **options)
    run.fit(model, loader(DATA.train), loader(DATA.validation) if validation else None,
            ckpt_path=resume, weights_only=True if resume else None)  # fmt: skip
    return model, callback.scheduler


def test_a_run_on_digits_learns_and_ends_on_the_levels(tmp_path):
    model, scheduler = fit(tmp_path, validation=True)
    assert scheduler.epoch == EPOCHS
    losses = [m["train_loss"] for m in scheduler.history.metrics]
    assert losses[-1] < 0.5 * losses[0]
    assert scheduler.state_dict()["steps_per_epoch"] == 10
    ls.finalize_(model, loader(DATA.train))
    ls.integer_weights(model)
    with torch.no_grad():
        right = model.eval()(DATA.test.x).argmax(1) == DATA.test.y
    assert right.float().mean() > 0.8


def assert_same(whole, resumed):
    assert whole[1].epoch == resumed[1].epoch == EPOCHS
    tables = [scheduler.history.schedule.table for _, scheduler in (whole, resumed)]
    assert torch.equal(*tables)
    for (name, a), b in zip(
        whole[0].state_dict().items(), resumed[0].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("validation", [False, True])
def test_a_run_resumed_from_lightnings_checkpoint_equals_the_uninterrupted_one(
    tmp_path, validation
):
    whole = fit(tmp_path, validation=validation)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, checkpoint, validation=validation)
    assert_same(whole, fit(tmp_path, validation=validation, resume=tmp_path / "epoch=2.ckpt"))


def test_a_checkpoint_between_the_last_batch_and_the_end_of_an_epoch_lacks_its_loss_only(tmp_path):
    def run(policy, resume=None):
        checkpoint = ModelCheckpoint(
            dirpath=tmp_path / type(policy).__name__,
            filename="{step}",
            save_top_k=-1,
            every_n_train_steps=10,
        )
        resume = resume and tmp_path / type(policy).__name__ / "step=30.ckpt"
        return fit(tmp_path, checkpoint, callback=QuantizationCallback(policy), resume=resume)

    blind, learned = ls.policies.AdditiveNoiseAnnealing(), ls.load_pretrained("default")
    assert_same(run(blind), run(blind, resume=True))
    run(learned)
    with pytest.warns(UserWarning, match="'train_loss' is nan: the policy is shown no change"):
        _, scheduler = run(learned, resume=True)
    assert scheduler.epoch == EPOCHS


def test_accumulated_batches_are_one_step(tmp_path):
    _, scheduler = fit(tmp_path, accumulate_grad_batches=2)
    assert scheduler.state_dict()["steps_per_epoch"] == 5


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="give the Trainer max_epochs"):
        fit(tmp_path, max_epochs=-1, max_steps=5)
    callback = QuantizationCallback(ls.load_pretrained("default"), metric="loss")
    words = r"needs the training loss: .* self.log\('loss', loss, on_epoch=True"
    with pytest.raises(KeyError, match=words):
        fit(tmp_path, callback=callback)


@pytest.mark.parametrize("options", [{}, {"on_step": True, "on_epoch": True}])
def test_a_loss_of_the_last_batch_is_warned_of(tmp_path, options):
    class Logged(Digits):
        def training_step(self, batch, index):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss, **options)
            self.losses.append(float(loss))
            return loss

    model = Logged()
    model.losses = []
    run, callback = trainer(tmp_path, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, loader(DATA.train))
    said = [w for w in caught if "'train_loss' batch by batch" in str(w.message)]
    assert len(said) == (0 if options else 1)
    shown = callback.scheduler.history.metrics[0]["train_loss"]
    # The last of the ten batches is smaller.
    sizes = [len(x) for x, _ in loader(DATA.train)]
    mean = sum(size * loss for size, loss in zip(sizes, model.losses[:10], strict=True)) / sum(
        sizes
    )
    assert shown == pytest.approx(mean if options else model.losses[9], rel=1e-5)


def test_a_module_that_is_quantized_too_late_is_told_where(tmp_path):
    class Late(Digits):
        def __init__(self):
            lightning.LightningModule.__init__(self)

        def configure_model(self):
            self.layers = digits_layers()
            ls.quantize_(self, ls.ternary(), ls.unsigned(2))

    run, _ = trainer(tmp_path)
    with pytest.raises(ValueError, match="quantize_ in its __init__, since Lightning"):
        run.fit(Late(), loader(DATA.train))


def test_averages_that_the_schedule_cannot_serve_are_refused(tmp_path):
    with pytest.raises(ValueError, match="averages weights that the schedule has frozen"):
        fit(tmp_path, StochasticWeightAveraging(swa_lrs=0.01))


def test_a_callback_serves_one_module_after_another(tmp_path):
    callback = QuantizationCallback(ls.load_pretrained("default"))
    for _ in range(2):
        model, scheduler = fit(tmp_path, callback=callback)
        assert scheduler.epoch == EPOCHS
        assert ls.integer_weights(model)
