"""What a user asks a distributed optimizer for: checks, texts for other ranks, parameters for the logger."""

from __future__ import annotations

import math

import pytest

from hvd_accordion import FP16, Accordion, AccordionBatchSize, Dense, MLflowLogger, PowerSGD, TopK
from hvd_accordion.policy.assignment import assign
from hvd_accordion.training import settings as module
from hvd_accordion.training.settings import Settings, check_logger, is_horovods, plain_spec, translated


def make(op="Average", **arguments) -> Settings:
    return Settings(op, "Average", "all ranks", **arguments)


@pytest.fixture(autouse=True)
def versions(monkeypatch):
    monkeypatch.setattr(module, "version", lambda package: {"hvd_accordion": "1.2", "horovod": "3.4"}[package])


@pytest.fixture(params=["torch", "tensorflow"])
def horovods(request):
    """hvd.Compression of either framework."""
    return pytest.importorskip(f"horovod.{request.param}").Compression


# checks


@pytest.mark.parametrize(
    ("argument", "value", "error", "allowed"),
    [
        ("backward_passes_per_step", 0, ValueError, "an integer >= 1"),
        ("backward_passes_per_step", 1.0, TypeError, "an integer >= 1"),
        ("gradient_predivide_factor", 0.0, ValueError, "(0, inf)"),
        ("gradient_predivide_factor", -1, ValueError, "(0, inf)"),
        ("gradient_predivide_factor", math.inf, ValueError, "(0, inf)"),
        ("gradient_predivide_factor", "1", TypeError, "(0, inf)"),
        ("sparse_as_dense", 1, TypeError, "True or False"),
        ("steps_per_epoch", 0, ValueError, "an integer >= 1"),
        ("steps_per_epoch", 2.5, TypeError, "an integer >= 1"),
        ("seed", -1, ValueError, "an integer >= 0"),
        ("seed", None, TypeError, "an integer >= 0"),
        ("min_compress_numel", 0, ValueError, "an integer >= 1"),
        ("min_compress_numel", True, TypeError, "an integer >= 1"),
        ("residual_decay", 0.0, ValueError, "(0, 1]"),
        ("residual_decay", 1.01, ValueError, "(0, 1]"),
        ("residual_decay", math.nan, ValueError, "(0, 1]"),
        ("residual_decay", "0.9", TypeError, "(0, 1]"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_what_is_allowed(argument, value, error, allowed):
    with pytest.raises(error) as raised:
        make(**{argument: value})
    message = str(raised.value)
    assert message.startswith(f"{argument} must be") and message.endswith(f"got {value!r}") and allowed in message


def test_only_a_mean_is_divided_beforehand():
    with pytest.raises(ValueError, match="gradient_predivide_factor not supported with op != Average"):
        make("Sum", gradient_predivide_factor=2.0)
    assert make("Sum").gradient_predivide_factor == 1.0
    assert make(gradient_predivide_factor=2.0).op == "Average"


@pytest.mark.parametrize(
    ("factor", "size", "scales"),
    [(1.0, 4, (0.25, 1.0)), (2.0, 4, (0.5, 0.5)), (8.0, 4, (0.125, 2.0)), (1, 1, (1.0, 1.0))],
)
def test_scales_before_and_after_the_sum_make_a_mean(factor, size, scales):
    before, after = make(gradient_predivide_factor=factor).scales(size)
    assert (before, after) == scales and before * after == 1 / size


# texts


def test_described_has_all_in_which_ranks_must_agree_but_groups():
    described = make(steps_per_epoch=7, seed=3, groups=[["w"]]).described("tensorflow", "2.99")
    assert described == {
        "versions": "hvd_accordion 1.2, horovod 3.4, tensorflow 2.99",
        "op": "Average",
        "backward_passes_per_step": "1",
        "gradient_predivide_factor": "1.0",
        "sparse_as_dense": "False",
        "steps_per_epoch": "7",
        "seed": "3",
        "min_compress_numel": "1024",
        "uneven_inputs": "False",
        "residual_decay": "1.0",
        "batch_size": "None",
    }


@pytest.mark.parametrize(
    "other",
    [
        {"op": "Sum"},
        {"backward_passes_per_step": 2},
        {"gradient_predivide_factor": 2.0},
        {"sparse_as_dense": True},
        {"steps_per_epoch": 5},
        {"seed": 1},
        {"min_compress_numel": 1},
        {"residual_decay": 0.9},
        {"batch_size": AccordionBatchSize(8, 16)},
    ],
    ids=str,
)
def test_whatever_differs_shows_under_its_own_name(other):
    plain, changed = make().described("torch", "2"), make(**other).described("torch", "2")
    assert [name for name in plain if plain[name] != changed[name]] == list(other)


def test_logged_without_an_accordion():
    logged = make(backward_passes_per_step=2, seed=5).logged(
        "Adam", TopK(0.1), assign(TopK(0.1), ["w"]), 4, "torch", "2.99"
    )
    assert logged == {
        "optimizer": "Adam",
        "compression": "TopK(ratio=0.1)",
        "world_size": 4,
        "backward_passes_per_step": 2,
        "steps_per_epoch": None,
        "compression_seed": 5,
        "version.hvd_accordion": "1.2",
        "version.horovod": "3.4",
        "version.torch": "2.99",
    }


def test_logged_with_an_accordion_has_its_settings():
    accordion = Accordion(PowerSGD(8), TopK(0.01), eta=0.3, interval=7, unit="steps", lr_drop=0.25)
    policy = assign({"bias": Dense(), "w": accordion}, ["bias", "w"])
    logged = make().logged("SGD", {"w": accordion}, policy, 2, "tensorflow", "2.99")
    plain = make().logged("SGD", {"w": accordion}, assign(Dense(), ["bias"]), 2, "tensorflow", "2.99")
    assert {key: logged[key] for key in logged.keys() - plain.keys()} == {
        "eta": 0.3,
        "interval": 7,
        "unit": "steps",
        "lr_drop": 0.25,
        "norm": "sampled",
        "critical": "PowerSGD(rank=8)",
        "relaxed": "TopK(ratio=0.01)",
    }


def test_logged_names_horovods_compressors_by_their_class(horovods):
    logged = make().logged("SGD", horovods.fp16, {}, 2, "torch", "2")
    assert logged["compression"] == "FP16Compressor"
    assert make().logged("SGD", None, {}, 2, "torch", "2")["compression"] == "None"


# Horovod's own compressors


def test_horovods_compressors_are_known_as_classes_and_objects_and_when_derived_from(horovods):
    derived = type("Mine", (horovods.none,), {})
    assert all(map(is_horovods, (horovods.none, horovods.fp16, horovods.fp16(), derived, derived())))


@pytest.mark.parametrize("other", [None, TopK(0.1), TopK, Accordion(), {}, "fp16", type("Compressor", (), {})], ids=str)
def test_nothing_else_is_horovods(other):
    assert not is_horovods(other)


def test_what_horovods_compressors_cost(horovods):
    assert plain_spec(horovods.fp16) == plain_spec(horovods.fp16()) == FP16(error_feedback=False)
    assert plain_spec(horovods.none) == plain_spec(horovods.none()) == plain_spec(None) == Dense()


def test_globs_get_specs_for_horovods_compressors(horovods):
    accordion = Accordion()
    globs = {"a": horovods.fp16, "b": horovods.none, "c": accordion, "d": None, "e": TopK(0.1)}
    found = translated(globs)
    assert found == {"a": FP16(error_feedback=False), "b": Dense(), "c": accordion, "d": None, "e": TopK(0.1)}
    assert list(found) == list(globs) and found["c"] is accordion
    assert globs["a"] is horovods.fp16, "the user's dict is left alone"


@pytest.mark.parametrize("other", [None, TopK(0.1), Accordion(), "topk"], ids=str)
def test_what_is_no_dict_is_left_as_it_is(other):
    assert translated(other) is other


# loggers


def test_a_logger_has_three_methods():
    methods = {"start": print, "log_epoch": print, "log_window": print}
    check_logger(None)
    check_logger(type("Logger", (), methods)())
    assert all(callable(getattr(MLflowLogger, name)) for name in methods)
    for name in methods:
        lacking = type("Logger", (), {**methods, name: 3})()
        with pytest.raises(TypeError, match=rf"logger must have a method {name}\(\), as MLflowLogger has, got <"):
            check_logger(lacking)


def test_false_is_no_logger():
    with pytest.raises(TypeError, match=r"logger must have .* got False"):
        check_logger(False)
