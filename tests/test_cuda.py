"""On a GPU: kernels against the composed operations in double precision, and the whole way there."""

import copy

import pytest
import torch
from test_kernels import SETS, inputs
from torch import nn

import learnsched as ls
from learnsched import kernels
from learnsched.data import load
from learnsched.meta.evolution import EvolutionStrategies
from learnsched.meta.inner import InnerState
from learnsched.meta.presets import PRESETS
from learnsched.meta.rollout import PolicyRollout
from learnsched.meta.tasks import Task
from learnsched.meta.trainer import MetaTrainer, TrainerConfig
from learnsched.meta.unrolled import Unrolled
from learnsched.noise import NOISES, noise_shape
from learnsched.policies import LearnedPolicy, MetaNetwork

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:no batch norm precedes"),
    pytest.mark.filterwarnings("ignore:outside of what the schedule was trained on"),
]
triton = pytest.mark.skipif(not kernels._has_triton(), reason="needs Triton")
every_set = pytest.mark.parametrize("levels", SETS, ids=lambda levels: levels.name)
every_noise = pytest.mark.parametrize("noise", NOISES)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 10),
    ).cuda()  # fmt: skip


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 1, 8, 8, generator=generator).cuda()
    return x, torch.randint(10, (64,), generator=generator).cuda()


def task(**changes):
    options = {
        "family": "cnn1d", "data": "mnist1d", "width": 6, "depth": 3, "horizon": 3, "steps": 4,
        "batch": 16, "bits": "ternary/2-bit", "learning_rates": (0.01, 0.02), "fine_tuning": False,
        "seed": 0,
    }  # fmt: skip
    return Task(**{**options, **changes})


@triton
@every_noise
@every_set
@pytest.mark.parametrize("shape", [(4, 3, 70), (4, 3000)], ids=["narrow", "wide"])
def test_kernels_agree_with_the_composed_operations_in_double_precision(levels, noise, shape):
    x, grad, outer, std, mean, scale = (t.cuda() for t in inputs(levels, shape))
    fixed = levels, std, mean, noise_shape(noise), scale
    wide = levels, std.double(), mean.double(), noise_shape(noise), scale.double()
    of_std = torch.randn_like(std)
    for function, tensors in (
        (kernels.value, (x,)),
        (kernels.slope, (grad, x)),
        (kernels.std_slope, (grad, x)),
        (kernels.slope_adjoint, (outer, grad, x)),
        (kernels.std_slope_adjoint, (of_std, grad, x)),
    ):
        got = function(*tensors, *fixed)
        expected = function(*(t.double() for t in tensors), *wide)
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        for ours, truth in pairs:
            # Sums over thousands of elements cancel; what is an element's own does not.
            close = 5e-3 if ours.shape == std.shape else 1e-3
            assert ours.dtype == torch.float32
            assert (ours.double() - truth).norm() <= close * truth.norm() + 1e-6, function.__name__


@triton
@every_set
def test_the_hard_staircase_is_exact_to_the_bit(levels):
    x, *_, scale = (t.cuda() for t in inputs(levels, (4, 5000)))
    got = kernels.value(x, levels, 0.0, 0.0, noise_shape("normal"), scale)
    assert torch.equal(got, levels.quantize(x / scale) * scale)
    edges = torch.tensor(levels.thresholds).cuda()
    assert torch.equal(kernels.value(edges, levels, 0.0, 0.0, noise_shape("normal"), None),
                       levels.quantize(edges))  # fmt: skip


@triton
def test_nan_stays_nan_where_noise_is_and_takes_the_lowest_level_where_none_is():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")]).cuda()
    soft = kernels.value(x, ls.unsigned(2), 0.3, 0.0, noise_shape("normal"), None)
    hard = kernels.value(x, ls.unsigned(2), 0.0, 0.0, noise_shape("normal"), None)
    assert soft[0].isnan()
    assert soft[1:].tolist() == [3.0, 0.0]
    assert hard.tolist() == [0.0, 3.0, 0.0]


@every_noise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype, noise):
    x = torch.randn(4096, device="cuda", dtype=dtype, requires_grad=True)
    wide = x.detach().float().requires_grad_()
    both = [
        ls.annealed_quantize(v, ls.unsigned(2), forward_std=0.3, backward_std=0.6, noise=noise)
        for v in (x, wide)
    ]
    both[0].float().sum().backward()
    both[1].sum().backward()
    assert both[0].dtype == x.grad.dtype == dtype
    torch.testing.assert_close(both[0].float(), both[1], atol=0.02, rtol=0.01)
    torch.testing.assert_close(x.grad.float(), wide.grad, atol=0.01, rtol=0.01)


@every_noise
def test_autograd_agrees_with_the_cpu_up_to_the_second_derivative(noise):
    results = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 400, generator=generator).to(device).requires_grad_()
        stds = [torch.tensor(s, device=device, requires_grad=True) for s in (0.3, 0.6)]
        y = ls.annealed_quantize(
            x, ls.signed(3), forward_std=stds[0], backward_std=stds[1], noise=noise
        )
        first = torch.autograd.grad((y**2).sum(), (x, stds[0]), create_graph=True)
        second = torch.autograd.grad((first[0] ** 2).sum() + first[1], (x, *stds))
        results.append([t.detach().cpu() for t in (y, *first, *second)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=2e-3)


def test_a_network_trains_under_the_learned_schedule_and_is_finalized():
    x, y = batch()
    model = ls.quantize_(network(), ls.ternary(), ls.unsigned(2), example_input=x)
    ls.calibrate_(model, [x])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    policy = ls.load_pretrained("default")
    scheduler = ls.QuantizationScheduler(model, policy, epochs=6, optimizer=optimizer)
    losses = []
    for _ in range(6):
        for _ in range(10):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        scheduler.step(metrics={"train_loss": loss})
    ls.finalize_(model, [x])
    assert losses[-1] < losses[0]
    assert all(w.codes.is_cuda for w in ls.integer_weights(model).values())
    on_cpu = copy.deepcopy(model).cpu().eval()
    agree = on_cpu(x.cpu()).argmax(1) == model.eval()(x).argmax(1).cpu()
    assert agree.float().mean() > 0.95


def test_a_training_step_does_not_wait_for_the_device():
    x, y = batch()
    model = ls.quantize_(network(), ls.ternary(), ls.unsigned(2), example_input=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ls.QuantizationScheduler(
        model, ls.policies.AdditiveNoiseAnnealing(), epochs=3, optimizer=optimizer
    )

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    x, y = batch()
    model = ls.quantize_(network(), ls.ternary(), ls.unsigned(2), example_input=x)
    with torch.autocast("cuda", dtype=dtype):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_compiled_model_gives_the_same_loss_and_gradients():
    x, y = batch()
    model = ls.quantize_(network(), ls.ternary(), ls.unsigned(2), example_input=x)
    ls.QuantizationScheduler(model, ls.policies.AdditiveNoiseAnnealing(), epochs=3)
    results = []
    for call in (model, torch.compile(model)):
        model.zero_grad()
        loss = nn.functional.cross_entropy(call(x), y)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_a_population_trains_as_on_the_cpu():
    results = []
    for device in ("cpu", "cuda"):
        inner = task().build(load("mnist1d"), device=device)
        policy = LearnedPolicy(MetaNetwork().to(device))
        estimate = Unrolled()(inner, PolicyRollout(policy, inner.run, 2))
        results.append((estimate.loss.cpu(), estimate.gradient.cpu()))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-2, rtol=1e-2)
    both = torch.stack([gradient.flatten() for _, gradient in results])
    assert torch.cosine_similarity(*both, dim=0) > 0.99


def test_the_outer_loss_of_a_state_is_that_of_the_cpu():
    losses = []
    for device in ("cpu", "cuda"):
        inner = task().build(load("mnist1d"), device=device)
        settings = torch.zeros(2, 3, 7, device=device)
        settings[..., [0, 2]], settings[..., [1, 3]] = 0.3, 0.6
        start = inner.initial()
        losses.append(inner.outer_loss(InnerState(start.tensors, 0), settings).cpu())
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimator", [Unrolled(damping=0.5), EvolutionStrategies(pairs=2)])
def test_meta_training_runs_and_resumes(estimator, tmp_path):
    quick = PRESETS["quick"].trainer
    architectures = (("mnist1d", "cnn1d", (6,), (3,)), ("digits", "cnn2d", (6,), (3,)))
    mix = quick.mix
    small = TrainerConfig(
        **{
            **vars(quick),
            "mix": type(mix)(**{**vars(mix), "architectures": architectures, "members": 2,
                                "total_steps": (12, 12), "horizons": (3,)}),
            "validation": (task(),),
            "validate_every": 1,
        }
    )  # fmt: skip
    for steps in (1, 2):  # the second trainer finds the first one's checkpoint
        policy = LearnedPolicy(MetaNetwork().cuda())
        trainer = MetaTrainer(policy, small, tmp_path, small.load_data(), estimator, device="cuda")
        trainer.run(steps)
    assert [entry["step"] for entry in trainer.log] == [0, 1, 2]
    assert all(p.isfinite().all() for p in policy.network.parameters())
