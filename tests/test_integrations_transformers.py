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


# Ten steps make an epoch: logs and checkpoints in its middle, at its end, and both.
@pytest.mark.parametrize(("save", "log", "resume"), [(13, 13, 26), (13, 100, 26), (10, 5, 30)])
def test_checkpoints_and_logs_after_any_number_of_steps(tmp_path, save, log, resume):
    options = {"save_strategy": "steps", "save_steps": save, "logging_steps": log}
    whole = fit(tmp_path, **options)
    assert whole[1].epoch == EPOCHS
    resumed = fit(tmp_path, resume=str(tmp_path / f"checkpoint-{resume}"), **options)
    assert_same(whole, resumed)


def test_the_policy_is_shown_the_mean_loss_of_the_epoch_whenever_it_is_logged(tmp_path):
    seen = [
        [m["train_loss"] for m in fit(tmp_path, logging_steps=n)[1].history.metrics]
        for n in (1, 4, 10, 500)
    ]
    for losses in seen:
        assert losses == pytest.approx(seen[0], rel=1e-5)


def test_accumulated_batches_are_one_step(tmp_path):
    _, scheduler = fit(tmp_path, gradient_accumulation_steps=2)
    assert scheduler.state_dict()["steps_per_epoch"] == 5


def trainer_of(folder, epochs=2, **options):
    callback = QuantizationCallback(ls.policies.IncrementalQuantization((0.5, 1.0)))
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=100, dataloader_pin_memory=False, save_strategy="epoch",
    )  # fmt: skip
    return Trainer(args=arguments, train_dataset=Rows(), callbacks=[callback], **options), callback


def test_the_model_that_model_init_makes_is_the_one_that_is_scheduled(tmp_path):
    trainer, callback = trainer_of(tmp_path, model_init=Digits)
    for _ in range(2):  # each time from a new model
        trainer.train()
        assert callback.scheduler.epoch == 2
        ls.integer_weights(trainer.model)
    whole = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    trainer, _ = trainer_of(tmp_path, model_init=Digits)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_a_model_is_not_trained_twice_by_one_schedule(tmp_path):
    trainer, _ = trainer_of(tmp_path, model=Digits())
    trainer.train()
    with pytest.raises(RuntimeError, match="has run 2 epochs: to train again"):
        trainer.train()


def test_a_callback_that_comes_late_is_refused(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(Digits(), arguments, train_dataset=Rows())
    trainer.add_callback(QuantizationCallback(ls.policies.StraightThrough()))
    with pytest.raises(RuntimeError, match="to the Trainer's constructor, not later"):
        trainer.train()


def test_the_arguments_in_readme_give_the_learning_rate_that_the_schedule_is_made_for(tmp_path):
    model = Digits()
    callback = QuantizationCallback(ls.load_pretrained("default"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=EPOCHS, learning_rate=0.01, use_cpu=True,
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
        per_device_train_batch_size=100, logging_steps=1,
        lr_scheduler_type="cosine", warmup_steps=0.2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    steps = len(rates)
    assert steps == 10 * EPOCHS
    assert rates == pytest.approx(
        [0.01 * callback.scheduler.learning_rate_factor(step) for step in range(steps)], abs=1e-6
    )


def test_a_run_whose_length_is_given_in_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_train_epochs, not max_steps"):
        fit(tmp_path, max_steps=20)


def test_a_checkpoint_of_another_folder_is_named_in_the_arguments_or_refused(tmp_path):
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "parts", save_strategy="epoch")
    path = str(tmp_path / "parts" / "checkpoint-30")
    with pytest.raises(FileNotFoundError, match=r"TrainingArguments\(resume_from_checkpoint"):
        fit(tmp_path / "elsewhere", resume=path)
    assert_same(whole, fit(tmp_path / "elsewhere", resume=path, resume_from_checkpoint=path))


def test_the_state_goes_into_the_folder_of_a_hyperparameter_search(tmp_path):
    class Args:
        output_dir = str(tmp_path)

    class State:
        is_world_process_zero, global_step = True, 10

    folder = tmp_path / "run-3" / "checkpoint-10"
    folder.mkdir(parents=True)
    callback = QuantizationCallback(ls.policies.StraightThrough())
    callback.scheduler = ls.QuantizationScheduler(Digits(), callback.policy, 3)
    callback.on_save(Args, State, None)
    assert [f.name for f in folder.iterdir()] == ["quantization_scheduler.pt"]
