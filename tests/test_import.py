"""`import learnsched` needs torch, numpy and safetensors, and loads nothing optional."""

import json
import subprocess
import sys

import pytest

import learnsched

OPTIONAL = (
    "matplotlib", "scipy", "higher", "optuna", "sklearn", "tqdm", "tensorboard", "mnist1d", "onnx",
    "onnxruntime", "qonnx", "lightning", "transformers", "skorch", "pandas", "hypothesis",
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    code = """
import json, sys
import torch
before = set(sys.modules)
import learnsched
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:learnsched", "-c", code],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert result.stderr == ""
    return [set(names) for names in json.loads(result.stdout)]


@pytest.mark.parametrize("name", OPTIONAL)
def test_import_loads_nothing_optional(loaded, name):
    assert name not in loaded[1]


def test_import_loads_none_of_its_own_workshop(loaded):
    heavy = ("learnsched.meta", "learnsched.benchmarks", "learnsched.data", "learnsched.export")
    assert not {m for m in loaded[1] if m.startswith(heavy)}


def test_every_public_name_is_there_and_documented():
    assert sorted(learnsched.__all__) == learnsched.__all__
    for name in learnsched.__all__:
        assert getattr(learnsched, name).__doc__, name
    for name in learnsched.policies.__all__:
        assert getattr(learnsched.policies, name).__doc__, name


BINDING = {
    "annealed_quantize", "binary", "calibrate_", "export_onnx", "export_qonnx", "export_ternary",
    "finalize_", "integer_reference", "integer_weights",
    "list_pretrained", "load_pretrained", "plot_comparison", "plot_schedule", "policies",
    "power_of_two", "quantize_", "QuantizationScheduler", "signed", "ternary", "unsigned",
}  # fmt: skip


def test_binding_names_are_public():
    assert set(learnsched.__all__) >= BINDING


def test_binding_policies_are_public():
    names = {
        "StraightThrough",
        "AdditiveNoiseAnnealing",
        "IncrementalQuantization",
        "LearnedPolicy",
    }
    assert names <= set(learnsched.policies.__all__)
