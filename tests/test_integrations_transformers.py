"""The callback of Transformers' Trainer: a run on digits, resumed from the Trainer's checkpoint."""

import pytest
import torch
from digits_network import digits_layers
from torch import nn
from torch.nn import functional as F

import learnsched as ls
from learnsched.data import load

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from learnsched.integrations.transformers import QuantizationCallback

EPOCHS = 6
DATA = load("digits")


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = digits_layers()
        ls.quantize_(self, ls.ternary(), ls.unsigned(2))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(DATA.train)

    def __getitem__(self, index):
        return {"x": DATA.train.x[index], "labels": DATA.train.y[index]}


def fit(folder, resume=None, **options):
    model = Digits()
    callback = QuantizationCallback(ls.load_pretrained("default"))
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, learning_rate=0.01, use_cpu=True,
        report_to=[], disable_tqdm=True, seed=3, dataloader_pin_memory=False,
        **{"per_device_train_batch_size": 100, "save_strategy": "no", **options},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return model, callback.scheduler


def assert_same(whole, resumed):
    for (name, a), b in zip(
        whole[0].state_dict().items(), resumed[0].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    tables = [scheduler.history.schedule.table for _, scheduler in (whole, resumed)]
    assert torch.equal(*tables)


def test_a_run_on_digits_learns_and_ends_on_the_levels(tmp_path):
    model, scheduler = fit(tmp_path)
    assert scheduler.epoch == EPOCHS
    losses = [m["train_loss"] for m in scheduler.history.metrics]
    assert losses[-1] < 0.5 * losses[0]
    assert scheduler.state_dict()["steps_per_epoch"] == 10
    ls.finalize_(model.layers, [DATA.train.x])
    ls.integer_weights(model)
    with torch.no_grad():
        right = model.eval().layers(DATA.test.x).argmax(1) == DATA.test.y
    assert right.float().mean() > 0.8


def test_a_run_resumed_from_the_trainers_checkpoint_equals_the_uninterrupted_one(tmp_path):
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "parts", save_strategy="epoch")
    resumed = fit(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-30"))
    assert_same(whole, resumed)


def test_a_checkpoint_in_the_middle_of_an_epoch_keeps_the_loss_so_far(tmp_path):
    # The Trainer loses the loss that it has not logged yet.
    options = {"save_strategy": "steps", "save_steps": 13, "logging_steps": 13}
    whole = fit(tmp_path / "whole", **options)
    resumed = fit(tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-26"), **options)
    assert_same(whole, resumed)


def test_accumulated_batches_are_one_step(tmp_path):
    _, scheduler = fit(tmp_path, gradient_accumulation_steps=2)
    assert scheduler.state_dict()["steps_per_epoch"] == 5


def test_a_callback_that_comes_late_is_refused(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(Digits(), arguments, train_dataset=Rows())
    trainer.add_callback(QuantizationCallback(ls.policies.StraightThrough()))
    with pytest.raises(RuntimeError, match="to the Trainer's constructor"):
        trainer.train()
