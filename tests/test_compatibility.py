"""The package inside what its users run it with: compilers, precisions, optimizers, wrappers, layers."""

import copy
import io
import os
import pickle
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import learnsched as ls
from learnsched.layers import quantized_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:no batch norm precedes", "ignore:outside of what the schedule"
)

EPOCHS = 5


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 8 * 8, 4),
    )  # fmt: skip
    return ls.quantize_(model, ls.ternary(), ls.unsigned(2), **options)


def batches(epoch, count=4, size=8):
    """Four classes, told apart by which quarter of the picture is bright."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(count):
        y = torch.randint(4, (size,), generator=generator)
        x = torch.randn(size, 1, 8, 8, generator=generator)
        for image, label in zip(x, y, strict=True):
            row, column = divmod(int(label), 2)
            image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 2.5
        yield x, y


def train(model, optimizer, scheduler, forward=None, data=batches, epochs=EPOCHS):
    """The losses of each epoch."""
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for x, y in data(epoch):
            loss = F.cross_entropy((forward or model)(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / 4
        losses.append(total)
        scheduler.step({"train_loss": total})
    return losses


def scheduled(model, optimizer=None, policy=None):
    policy = policy or ls.load_pretrained("default")
    return ls.QuantizationScheduler(
        model, policy, EPOCHS, steps_per_epoch=4, optimizer=optimizer, seed=1
    )


def adam(model, lr=0.02):
    return torch.optim.Adam(model.parameters(), lr=lr)


def codes(model):
    return {name: found.codes for name, found in ls.integer_weights(model).items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def finished(model):
    """On the level set, alive, and the same after its state was read back."""
    ls.finalize_(model, batches(99))
    found = codes(model)
    assert found
    for layer in quantized_layers(model):
        for quantizer in layer.quantizers:
            assert quantizer.forward_std == 0
    return found


def learns(losses):
    return losses[-1] < 0.8 * losses[0]


# -- compilers and precision


@pytest.mark.parametrize("steps", [4, None])
def test_a_compiled_model_is_not_compiled_again_at_every_epoch(steps):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = network()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    scheduler = ls.QuantizationScheduler(
        model, ls.load_pretrained("default"), EPOCHS, steps_per_epoch=steps
    )
    optimizer, counts = adam(model), []

    def forward(x):
        counts.append(counter.frame_count)
        return compiled(x)

    losses = train(model, optimizer, scheduler, forward)
    torch._dynamo.reset()
    # Steps that are not given are counted by a hook in the first epoch: once with it, once without.
    assert counter.frame_count == (1 if steps else 2)
    assert counts[5] == counter.frame_count
    eager = network()
    assert losses == pytest.approx(train(eager, adam(eager), scheduled(eager)), abs=5e-3)
    finished(model)


def test_a_model_that_is_compiled_without_breaks_is_calibrated_and_finished():
    torch._dynamo.reset()
    models = [network(), network()]
    compiled = torch.compile(models[0], backend="eager", fullgraph=True)
    compiled(next(iter(batches(0)))[0])
    for model in (compiled, models[1]):
        ls.calibrate_(model, batches(0))
        ls.finalize_(model, batches(0))
    torch._dynamo.reset()
    assert_same(dict(models[0].state_dict()), dict(models[1].state_dict()))


@pytest.mark.slow
def test_inductor_computes_what_eager_computes():
    torch._dynamo.reset()
    model = network()
    losses = train(model, adam(model), scheduled(model), torch.compile(model))
    torch._dynamo.reset()
    eager = network()
    assert losses == pytest.approx(train(eager, adam(eager), scheduled(eager)), abs=2e-2)
    finished(model)


def test_a_compiled_model_s_micro_batches_share_a_quantized_weight():
    from torch._dynamo.testing import CompileCounterWithBackend

    def trained(compile):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
        ls.quantize_(model, ls.ternary(), ls.unsigned(2))
        forward, optimizer = compile(model), torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(12):
            optimizer.zero_grad()
            with ls.quantize_once(model):
                for x in torch.randn(3, 16, 8):
                    forward(x).square().mean().backward()
            optimizer.step()
        return model

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = trained(lambda model: torch.compile(model, backend=counter))
    torch._dynamo.reset()
    assert counter.frame_count <= 5  # what lies between the two layers, not a graph for each step
    eager = trained(lambda model: model)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:no batch norm")
def test_a_compiled_model_is_quantized_without_a_false_warning():
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    model = torch.compile(copy.deepcopy(plain), backend="eager")
    x = torch.randn(2, 8)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no batch norm")
        ls.quantize_(model, ls.ternary(), ls.unsigned(2), example_input=x)
    twin = ls.quantize_(plain, ls.ternary(), ls.unsigned(2), example_input=x)
    torch.testing.assert_close(model(x), twin(x))


@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_older_exporter_of_torch_writes_what_the_network_computes(dtype, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.randn(64, 8, dtype=dtype)
    layers = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
    model = nn.Sequential(*layers).to(dtype)
    ls.finalize_(ls.quantize_(model, ls.ternary(), ls.unsigned(2)), [x]).eval()
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        model, (x[:4],), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
    )
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


def test_autocast_in_bfloat16_trains_and_ends_on_the_levels():
    model = network()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.bfloat16
        return out

    losses = train(model, adam(model), scheduled(model), forward)
    reference = network()
    wide = train(reference, adam(reference), scheduled(reference))
    assert learns(losses)
    assert losses == pytest.approx(wide, abs=0.15)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    finished(model)


def test_channels_last_gives_the_same_network():
    plain, last = network(), network().to(memory_format=torch.channels_last)
    assert last[3].weight.is_contiguous(memory_format=torch.channels_last)

    def strided(epoch):
        return ((x.to(memory_format=torch.channels_last), y) for x, y in batches(epoch))

    expected = train(plain, adam(plain), scheduled(plain))
    losses = train(last, adam(last), scheduled(last), data=strided)
    assert losses == pytest.approx(expected, rel=0.05)
    finished(last)


# -- optimizers


class Lion(torch.optim.Optimizer):
    """As a third party writes it: sign of an interpolated momentum, decoupled decay (Chen 2023)."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * momentum.lerp(p.grad, 1 - first).sign())
                momentum.lerp_(p.grad, 1 - second)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "AdamW, per tensor": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=False, amsgrad=True),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Lion": lambda p: Lion(p, lr=0.01),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_weights_stay_to_the_bit_under_any_optimizer(make, given):
    model = network()
    optimizer = make(model.parameters())
    scheduler = scheduled(
        model, optimizer if given else None, ls.policies.IncrementalQuantization()
    )
    frozen = {}

    def forward(x):
        for name, module in model.named_modules():
            if hasattr(module, "weight_quantizer"):
                quantizer = module.weight_quantizer
                used = quantizer(module.weight).detach()
                old, value = frozen.get(name, (quantizer.membership, used))
                assert torch.equal(used[old > 0], value[old > 0])
                frozen[name] = quantizer.membership.clone(), used
        return model(x)

    losses = train(model, optimizer, scheduler, forward)
    assert min(losses) < losses[0]
    finished(model)


def test_accumulated_gradients_count_optimizer_steps_and_train_as_whole_batches_do():
    def halves(model, optimizer, scheduler):
        for epoch in range(EPOCHS):
            for x, y in batches(epoch):
                optimizer.zero_grad()
                for part in (slice(0, 4), slice(4, 8)):
                    (F.mse_loss(model(x[part])[:, 0], y[part].float()) / 2).backward()
                optimizer.step()
            scheduler.step({"train_loss": 1.0})

    def whole(model, optimizer, scheduler):
        for epoch in range(EPOCHS):
            for x, y in batches(epoch):
                optimizer.zero_grad()
                F.mse_loss(model(x)[:, 0], y.float()).backward()
                optimizer.step()
            scheduler.step({"train_loss": 1.0})

    results = []
    for loop in (halves, whole):
        model = network().eval()  # statistics of a batch differ from those of its halves
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scheduler = ls.QuantizationScheduler(
            model, ls.policies.AdditiveNoiseAnnealing(), EPOCHS, optimizer=optimizer
        )
        loop(model, optimizer, scheduler)
        assert scheduler.state_dict()["steps_per_epoch"] == 4
        results.append(finished(model))
    agree = [(results[0][k] == results[1][k]).float().mean() for k in results[0]]
    assert min(agree) > 0.99  # sums in another order may move a weight across a threshold


# -- copies, averages, files


def nearest(rule, weight, held):
    """The weight on its levels, at the scale of the rule or the held one, whichever is nearer."""
    found = [ls.ternary().quantize(weight / s) * s for s in (held, rule(weight, ls.ternary()))]
    return min(found, key=lambda projected: float((weight - projected).detach().norm()))


def averaged(decay=0.6, epochs_more=0, **options):
    """A trained model and its average, both before ``finalize_``."""
    model = network()
    optimizer = adam(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), **options)
    scheduler = scheduled(model, optimizer)
    for epoch in range(EPOCHS):
        train(model, optimizer, scheduler, data=lambda _, e=epoch: batches(e), epochs=1)
        average.update_parameters(model)
    for _ in range(epochs_more):
        average.update_parameters(model)
    return model, average


def test_averages_of_weights_are_projected_anew_with_a_warning():
    model, average = averaged(decay=0.8)
    trained = finished(model)
    before = [p.clone() for p in average.parameters()]
    scales = [layer.weight.weight_quantizer.held_scale for layer in quantized_layers(model)]
    with pytest.warns(UserWarning, match=r"those of \['0', '3', '7'\] are projected anew"):
        ls.finalize_(average, batches(99))
    projected = codes(average.module)
    assert any(not torch.equal(trained[k], projected[k]) for k in trained)
    for layer, old, held in zip(
        quantized_layers(average), (before[0], before[4], before[8]), scales, strict=True
    ):
        assert torch.equal(
            layer.weight.weight, nearest(layer.weight.weight_quantizer.rule, old, held)
        )
    state = {k: v.clone() for k, v in average.state_dict().items()}
    ls.finalize_(average)  # neither warns nor changes anything
    assert_same(dict(average.state_dict()), state)


@pytest.mark.parametrize("buffers", [True, False])
def test_averages_taken_after_everything_is_frozen_end_on_the_levels_too(buffers):
    model = network()
    optimizer = adam(model)
    train(model, optimizer, scheduled(model, optimizer))
    average = AveragedModel(model, use_buffers=buffers)
    for seed in (1, 2):
        other = network()
        with torch.no_grad():
            for p in other.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        train(other, adam(other), scheduled(other))
        average.update_parameters(other)
    with pytest.warns(UserWarning, match="averages of quantized weights"):
        ls.finalize_(average, batches(99))
    codes(average)


def test_an_average_of_buffers_too_is_projected_anew_without_its_wrapper():
    _, average = averaged(decay=0.9, use_buffers=True)
    inner = average.module
    quantizers = [layer.weight.weight_quantizer for layer in quantized_layers(inner)]
    old = [layer.weight.weight.clone() for layer in quantized_layers(inner)]
    scales = [quantizer.held_scale.clone() for quantizer in quantizers]
    with pytest.warns(UserWarning, match="averages of quantized weights"):
        ls.finalize_(inner, batches(99))
    for quantizer, layer, weight, held in zip(
        quantizers, quantized_layers(inner), old, scales, strict=True
    ):
        assert torch.equal(layer.weight.weight, nearest(quantizer.rule, weight, held))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.finalize_(inner)


def test_an_average_is_the_same_without_its_wrapper():
    _, average = averaged()
    inner = copy.deepcopy(average.module)
    fresh = network()
    fresh.load_state_dict(average.module.state_dict())
    for one in (average, inner, fresh):
        with pytest.warns(UserWarning, match="averages of quantized weights"):
            ls.finalize_(one)
    assert_same(codes(inner), codes(average.module))
    assert_same(codes(fresh), codes(average.module))


def test_an_average_that_has_come_to_the_levels_is_its_model_again():
    model, average = averaged(epochs_more=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.finalize_(average)
        ls.finalize_(model)
    for ours, theirs in zip(quantized_layers(average), quantized_layers(model), strict=True):
        assert torch.equal(ours.weight.weight, theirs.weight.weight)


def test_values_written_over_frozen_weights_are_taken_after_the_end_alone():
    model = network()
    best = [layer.weight.weight.clone() for layer in quantized_layers(model)]
    optimizer = adam(model)
    scheduler = scheduled(model, optimizer)
    train(model, optimizer, scheduler, epochs=EPOCHS - 2)
    middle = copy.deepcopy(model)
    train(model, optimizer, scheduler, epochs=2)

    def write(one):
        with torch.no_grad():
            for layer, values in zip(quantized_layers(one), best, strict=True):
                layer.weight.weight.copy_(values)

    write(model)
    with pytest.warns(UserWarning, match="other values written"):
        ls.finalize_(model)
    for layer, values in zip(quantized_layers(model), best, strict=True):
        quantizer = layer.weight.weight_quantizer
        assert torch.equal(
            layer.weight.weight, nearest(quantizer.rule, values, quantizer.held_scale)
        )
    held = [layer.weight.weight_quantizer.held.clone() for layer in quantized_layers(middle)]
    marks = [layer.weight.weight_quantizer.membership > 0 for layer in quantized_layers(middle)]
    write(middle)
    with pytest.warns(UserWarning, match="go back to their levels"):
        ls.finalize_(middle)
    for layer, values, frozen in zip(quantized_layers(middle), held, marks, strict=True):
        assert bool(frozen.any())
        assert torch.equal(layer.weight.weight[frozen], values[frozen])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_in_the_middle_of_training_goes_on_alike(duplicate):
    model = network()
    optimizer = adam(model)
    scheduler = scheduled(model, optimizer)
    train(model, optimizer, scheduler, epochs=3)
    twin, fresh = duplicate(model), network()
    fresh_optimizer = adam(fresh)
    resumed = scheduled(fresh, fresh_optimizer)
    fresh.load_state_dict(twin.state_dict())
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    fresh_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def later(epoch):
        return batches(epoch + 3)

    train(model, optimizer, scheduler, data=later, epochs=2)
    train(fresh, fresh_optimizer, resumed, data=later, epochs=2)
    assert_same(finished(model), finished(fresh))
    ls.finalize_(twin)  # independent of what the others did


def test_checkpoints_need_no_pickle_and_resume_to_the_bit():
    def start():
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        return model, optimizer, scheduled(model, optimizer)

    whole = start()
    train(*whole)
    first = start()
    train(*first, epochs=2)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = start()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, data=lambda epoch: batches(epoch + 2), epochs=3)
    assert_same(dict(whole[0].state_dict()), dict(second[0].state_dict()))


class Codes(torch.utils.data.Dataset):
    """Computes its examples with a quantized model, as a teacher in a data-loader worker does."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, index):
        return self.model(torch.full((1, 1, 8, 8), float(index)))[0]


@pytest.mark.slow
def test_models_and_policies_travel_to_data_loader_workers():
    model = network().eval()
    data = Codes(model)
    loader = torch.utils.data.DataLoader(data, 4, num_workers=1, multiprocessing_context="spawn")
    (found,) = loader
    torch.testing.assert_close(found, torch.stack([data[i] for i in range(4)]))
    policy = pickle.loads(pickle.dumps(ls.load_pretrained("default")))
    assert repr(policy) == repr(ls.load_pretrained("default"))


# -- layers


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.inner.weight
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.again(torch.tanh(self.inner(x)))))


def test_tied_weights_are_one_layer_with_one_quantizer():
    torch.manual_seed(0)
    model = ls.quantize_(Tied(), ls.ternary(), example_input=torch.zeros(1, 6))
    assert model.inner.weight_quantizer is model.again.weight_quantizer
    assert [layer.info.name for layer in quantized_layers(model)] == ["inner", "out"]
    optimizer = adam(model)
    scheduler = ls.QuantizationScheduler(
        model, ls.policies.AdditiveNoiseAnnealing(), EPOCHS, optimizer=optimizer
    )

    def data(epoch):
        return ((x.flatten(1)[:, ::11], y) for x, y in batches(epoch))

    train(model, optimizer, scheduler, data=data)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.inner.weight is twin.again.weight
        assert twin.inner.weight_quantizer is twin.again.weight_quantizer
    ls.finalize_(model)
    assert list(ls.integer_weights(model)) == ["inner", "out"]
    x = torch.randn(3, 6)
    loaded = ls.quantize_(Tied(), ls.ternary())
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))


LAYERS = {
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "depth multiplier": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2),
    "transposed, strided": lambda: nn.ConvTranspose2d(4, 6, 2, 2, output_padding=1, dilation=2),
    "transposed, depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4),
    "of volumes": lambda: nn.Conv3d(4, 6, 3, padding=1, stride=2, groups=2),
    "transposed, of volumes": lambda: nn.ConvTranspose3d(4, 6, 3, 2, output_padding=1, groups=2),
}


@pytest.mark.parametrize("weight", [ls.ternary(), ls.binary(), ls.signed(3)], ids=lambda w: w.name)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_every_kind_of_convolution_computes_with_its_level_weights(make, weight):
    torch.manual_seed(0)
    layer = make()
    plain = copy.deepcopy(layer)
    ls.quantize_(layer, weight)
    x = torch.randn(2, 4, *(5 for _ in layer.kernel_size))
    with torch.no_grad():
        scale = layer.weight_quantizer.scale(layer.weight)
        levels = weight.quantize(layer.weight / scale)
        plain.weight.copy_(levels * scale)
        assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    ls.finalize_(layer)
    found = ls.integer_weights(layer)[""]
    assert torch.equal(found.integers.to(levels.dtype), levels)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_channels_of_a_transposed_convolution_are_in_its_second_dimension(groups):
    layer = ls.quantize_(nn.ConvTranspose1d(4, 6, 3, groups=groups), ls.ternary())
    weight = layer.weight.detach()
    scale = layer.weight_quantizer.scale(weight)
    expected = weight.abs().mean(dim=(0, 2))
    torch.testing.assert_close(scale.flatten(), expected)
    assert scale.shape == (1, 6 // groups, 1)
    (found,) = quantized_layers(layer)
    assert found.info.fan_in == 4 * 3 // groups
    x = torch.randn(2, 4, 5)
    assert layer(x, output_size=[7]).shape == (2, 6, 7)


def test_an_autoencoder_of_transposed_convolutions_trains():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    ls.quantize_(model, ls.ternary(), ls.unsigned(2), example_input=torch.zeros(1, 1, 8, 8))
    losses = train(model, adam(model, 0.05), scheduled(model))
    assert losses[-1] < losses[0]
    finished(model)


def test_a_model_without_batch_norm_is_calibrated_and_trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)
    )
    with pytest.warns(UserWarning, match="no batch norm precedes"):
        ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    ls.calibrate_(model, batches(0))
    losses = train(model, adam(model, 0.01), scheduled(model))
    assert learns(losses)
    ls.finalize_(model)  # nothing to re-estimate
    ls.finalize_(model, batches(99))
    codes(model)


class Block(nn.Module):
    """Pre-norm attention and MLP, as in a vision transformer."""

    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.mlp(self.between(x))


class SmallViT(nn.Module):
    def __init__(self, width=16, depth=2):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.place = nn.Parameter(torch.randn(1, 4, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


def test_a_small_vision_transformer_trains_with_its_ends_kept_real():
    torch.manual_seed(0)
    model = SmallViT()
    ls.quantize_(
        model, ls.ternary(), ls.signed(4), skip=("first", "last"),
        example_input=torch.zeros(1, 1, 8, 8),
    )  # fmt: skip
    ls.calibrate_(model, batches(0))
    names = [layer.info.name for layer in quantized_layers(model)]
    assert names == [f"blocks.{b}.{n}" for b in (0, 1) for n in ("qkv", "proj", "mlp.0", "mlp.2")]
    scheduler = ls.QuantizationScheduler(
        model, ls.load_pretrained("default"), EPOCHS, steps_per_epoch=16
    )
    assert learns(
        train(model, adam(model, 0.01), scheduler, data=lambda epoch: batches(epoch, count=16))
    )
    finished(model)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, nn.GRUCell])
def test_recurrent_layers_are_refused_unless_they_are_kept_real(make):
    model = nn.ModuleDict({"memory": make(4, 4), "out": nn.Linear(4, 4)})
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"memory is a recurrent layer \({make.__name__}\).*over"):
        ls.quantize_(model, ls.ternary())
    assert_same(dict(model.state_dict()), state)
    ls.quantize_(model, ls.ternary(), overrides={"memory": None})
    assert [layer.info.name for layer in quantized_layers(model)] == ["out"]
    with pytest.raises(ValueError, match="is a recurrent layer"):
        ls.quantize_(make(4, 4), ls.ternary())


def test_activations_around_a_recurrent_layer_can_be_quantized():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.memory = nn.ReLU(), nn.GRU(4, 4)

        def forward(self, x):
            return self.memory(self.act(x))[0]

    model = ls.quantize_(Tagger(), activation=ls.unsigned(2), example_input=torch.zeros(3, 1, 4))
    assert type(model.act).__name__ == "ActivationQuantizer"


# -- another default device


def test_a_model_on_the_cpu_trains_whatever_the_default_device(tmp_path):
    """In a process of its own: kernels keep what they have made of a level set."""
    code = """
import torch, learnsched as ls
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
with torch.device("cpu"):
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
torch.set_default_device("meta")
ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=x)
ls.calibrate_(net, [x])
policy = ls.load_pretrained("default")
scheduler = ls.QuantizationScheduler(net, policy, 6, steps_per_epoch=1, optimizer=optimizer)
for epoch in range(6):
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    scheduler.step({"train_loss": loss.item()})
ls.finalize_(net, [x])
print(sorted({v for w in ls.integer_weights(net).values() for v in w.integers.unique().tolist()}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "[-1, 0, 1]"


# -- data parallel


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def replica(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = adam(model)
    policy = ls.policies.LearnedPolicy(ls.load_pretrained("default").network)
    policy.partition = "random"
    scheduler = ls.QuantizationScheduler(wrapped, policy, EPOCHS, optimizer=optimizer)
    masks = []
    for epoch in range(EPOCHS):
        for x, y in list(batches(epoch))[rank::2]:
            loss = F.cross_entropy(wrapped(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # Losses differ between the ranks, and one of them is not finite once.
        scheduler.step({"train_loss": float("nan") if rank and epoch == 1 else loss.item() + rank})
        masks.append(
            [layer.weight.weight_quantizer.membership.clone() for layer in scheduler._layers]
        )
    ls.finalize_(wrapped)
    state = scheduler.state_dict()
    state["metrics"] = [m["train_loss"] for m in state["metrics"]]
    torch.save((masks, state, codes(wrapped)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_data_parallel_processes_have_the_same_settings_masks_and_codes(tmp_path):
    torch.multiprocessing.spawn(replica, (free_port(), tmp_path), nprocs=2)
    (masks, state, found), (masks2, state2, found2) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for mine, theirs in zip(masks, masks2, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.equal(state["settings"], state2["settings"])
    assert state["steps_per_epoch"] == state2["steps_per_epoch"] == 2
    assert repr(state["metrics"]) == repr(state2["metrics"])
    assert len(set(map(repr, state["metrics"]))) == EPOCHS
    assert [m != m for m in state["metrics"]] == [False, True, False, False, False]
    assert_same(found, found2)
    shares = [sum(m.sum() for m in row) / sum(m.numel() for m in row) for row in masks]
    assert 0 < shares[2] < 1 == shares[4]


def without_a_metric(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    wrapped = nn.parallel.DistributedDataParallel(network())
    scheduler = ls.QuantizationScheduler(wrapped, ls.load_pretrained("default"), EPOCHS)
    said = []
    for metrics in ({"train_loss": 1.0} if rank else None, {"train_loss": 1.0 if rank else "much"}):
        try:
            scheduler.step(metrics)
        except (KeyError, TypeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    torch.save((said, scheduler.epoch), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_metric_that_one_process_lacks_stops_all_of_them(tmp_path):
    torch.multiprocessing.spawn(without_a_metric, (free_port(), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    said, epoch = first
    assert epoch == 0
    assert "needs the metric 'train_loss' on every rank" in said[0]
    assert "on rank 0, the metric 'train_loss' must be a number" in said[1]
