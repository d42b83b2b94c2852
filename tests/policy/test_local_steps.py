"""What users may ask of local steps, and Accordion's rule on their number."""

from __future__ import annotations

import functools

import pytest

from hvd_accordion import AccordionSteps, AutoSteps, LocalSteps


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be an integer >= 1, got 0"),
        ({"every": 2.5}, TypeError, "every must be an integer >= 1, got 2.5"),
        ({"every": 4, "fragments": 5}, ValueError, "fragments must be an integer in [1, 4], got 5"),
        ({"every": 4, "delay": 4}, ValueError, "delay must be an integer in [0, 3], got 4"),
        ({"every": AccordionSteps(2, 8), "delay": 2}, ValueError, "delay must be an integer in [0, 1], got 2"),
        ({"residual_decay": 0.0}, ValueError, "residual_decay must be a number in (0, 1], got 0.0"),
        ({"outer": 0.7}, TypeError, "outer must be None or a function that makes an optimizer"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error) as raised:
        LocalSteps(**arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"critical": 0}, "critical must be an integer >= 1"),
        ({"critical": 5, "relaxed": 5}, "relaxed must be more than critical=5, got 5"),
        ({"interval": 10, "unit": "steps"}, "interval must be at least relaxed=20 steps, got 10"),
        ({"eta": 0}, "eta must be"),
        ({"lr_drop": 1.0}, "lr_drop must be"),
    ],
)
def test_rule_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        AccordionSteps(**arguments)


def test_text_names_what_is_not_the_default():
    assert str(LocalSteps(5)) == "LocalSteps(every=5)"
    outer = functools.partial(dict, lr=1)
    assert str(LocalSteps(5, outer, fragments=2)) == "LocalSteps(every=5, outer=dict(lr=1), fragments=2)"
    rule = AccordionSteps(1, 10)
    assert str(LocalSteps(rule)) == "LocalSteps(every=AccordionSteps(critical=1, relaxed=10, eta=0.5, every 10 epochs))"


def test_rule():
    """Critical up to the first comparison and where the norm changes; relaxed elsewhere; critical after a drop."""
    rule = AccordionSteps(2, 16, eta=0.5)
    assert rule.steps == 2
    for norm, steps in ((10.0, 2), (9.0, 16), (4.0, 2), (4.0, 16)):
        rule.observe(norm, 0.1)
        assert rule.steps == steps
    assert rule.observe_lr(0.05) and rule.steps == 2
    again = AccordionSteps(2, 16)
    again.load_state_dict(rule.state_dict())
    assert again.steps == 2 and again.norms == rule.norms


@pytest.mark.parametrize(
    ("step", "exchange", "chosen"), [(0.1, 0.2, 18), (0.1, 0.001, 2), (0.1, 100.0, 50), (0.0, 1.0, 50)]
)
def test_exchanges_take_their_share_of_the_time(step, exchange, chosen):
    auto = AutoSteps(share=0.1, least=2, most=50)
    assert auto.choose(step, exchange) == chosen
    if 2 < chosen < 50:
        assert exchange / (exchange + chosen * step) <= 0.1 < exchange / (exchange + (chosen - 1) * step)


def test_bounds_of_what_the_link_decides():
    with pytest.raises(ValueError, match="most must be an integer >= 6, got 5"):
        AutoSteps(most=5)
    with pytest.raises(ValueError, match="share must be"):
        AutoSteps(share=1.0)
    assert LocalSteps(AutoSteps()).shortest == 5
