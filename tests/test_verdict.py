"""The rules of the verdict, one by one, at their thresholds."""

import itertools

import numpy as np
import pandas as pd
import pytest

from escape_inference.escape_check import EscapeCheck
from escape_inference.verdict import LOG_BAYES_MARGIN, WIDTHS, Candidate, Pair, decide, required_errors, shortfall

NAN = float("nan")


def check(grade="memoryless", conditions=36):
    """Thirty-six tested conditions of one grade."""
    frame = pd.DataFrame({"tested": [True] * conditions, "grade": grade, "coefficient_of_variation": 0.09})
    return EscapeCheck(frame, grade, 0.4)


def law(name, trustworthy=True, special_cases=(), reason=""):
    return Candidate(name, special_cases, trustworthy, reason)


def gaps(first, second, elpd=30.0, error=3.0, log_bayes=25.0, **by_width):
    """Both orders of two laws, the same at every prior width unless told otherwise (``half=``, ``double=``)."""
    rows = []
    for width in WIDTHS:
        changed = by_width.get({0.5: "half", 2.0: "double"}.get(width, ""), {})
        rows.append(
            Pair(
                width,
                changed.get("elpd", elpd),
                changed.get("error", error),
                changed.get("log_bayes", log_bayes),
            )
        )
    backwards = [Pair(p.width, -p.elpd_diff, p.elpd_diff_se, -p.log_bayes_factor) for p in rows]
    return {(first, second): rows, (second, first): backwards}


def two(conditions=36, candidates=None, grade="memoryless", **numbers):
    candidates = candidates or [law("power_law"), law("arrhenius")]
    return decide(check(grade), candidates, gaps("power_law", "arrhenius", **numbers), conditions)


# --- the first rules


def test_times_that_are_no_escape_end_the_contest_before_any_law_is_looked_at():
    verdict, reason = two(grade="not_escape")
    assert verdict == "not_escape"
    assert "36 not escape" in reason and "0.09" in reason


def test_delayed_times_do_not_end_the_contest():
    assert two(grade="delayed").verdict == "power_law"


def test_not_escape_comes_before_fits_that_cannot_be_trusted():
    bad = [law("power_law", False, reason="R-hat 1.2"), law("arrhenius", False, reason="R-hat 1.3")]
    assert decide(check("not_escape"), bad, {}, 36).verdict == "not_escape"


def test_without_a_trustworthy_fit_there_is_no_verdict_and_the_reason_names_every_law():
    bad = [law("power_law", False, reason="R-hat 1.2"), law("arrhenius", False, reason="14 divergences")]
    verdict, reason = decide(check(), bad, {}, 36)
    assert verdict == "inconclusive"
    assert "power_law: R-hat 1.2" in reason and "arrhenius: 14 divergences" in reason


def test_a_single_law_cannot_win():
    verdict, reason = decide(check(), [law("power_law")], {}, 36)
    assert verdict == "inconclusive"
    assert reason == "power_law is the only law that was fitted, so there is nothing to compare it with"


def test_without_an_escape_to_fit_a_law_to_the_reason_says_so():
    verdict, reason = decide(check(), [], {}, 0)
    assert verdict == "inconclusive"
    assert reason.startswith("no escape is left to fit a law to. Of 36 conditions")


def test_one_condition_has_no_standard_error_and_the_reason_says_so():
    verdict, reason = two(conditions=1, error=NAN)
    assert verdict == "inconclusive"
    assert "one condition gives no standard error of the elpd difference 30.0" in reason and "nan" not in reason


def test_a_law_whose_sampler_did_not_converge_cannot_win():
    candidates = [law("power_law", False, reason="R-hat 1.2"), law("arrhenius"), law("constant_rate")]
    verdict, reason = decide(check(), candidates, gaps("arrhenius", "constant_rate"), 36)
    assert verdict == "inconclusive"
    assert "power_law: R-hat 1.2" in reason and reason.startswith("arrhenius leads")


def test_nobody_wins_against_a_rival_that_could_not_be_fitted():
    candidates = [law("power_law"), law("arrhenius", False, reason="14 divergences")]
    verdict, reason = decide(check(), candidates, {}, 36)
    assert verdict == "inconclusive"
    assert "arrhenius: 14 divergences" in reason


# --- winning against an unrelated law


def test_a_law_that_passes_every_test_wins_and_the_reason_has_the_numbers():
    verdict, reason = two(elpd=31.4, error=3.14, log_bayes=27.2)
    assert verdict == "power_law"
    assert all(text in reason for text in ("arrhenius", "31.4", "10.0 standard errors", "27.2"))


def test_the_order_of_the_candidates_does_not_matter():
    pairs = gaps("power_law", "arrhenius") | gaps("power_law", "constant_rate") | gaps("arrhenius", "constant_rate")
    candidates = [law("power_law"), law("arrhenius"), law("constant_rate")]
    assert {decide(check(), list(order), pairs, 36).verdict for order in itertools.permutations(candidates)} == {
        "power_law"
    }


@pytest.mark.parametrize(("elpd", "verdict"), [(4.0, "power_law"), (3.999, "inconclusive"), (-4.0, "inconclusive")])
def test_the_elpd_difference_must_reach_four(elpd, verdict):
    found, reason = two(elpd=elpd, error=0.1)
    assert found == verdict
    if elpd == 3.999:
        assert "elpd difference 4.0 is below 4" in reason and "power_law has the highest elpd" in reason


@pytest.mark.parametrize(
    ("conditions", "errors", "verdict"),
    [
        (99, 5.0, "power_law"),
        (99, 4.99, "inconclusive"),
        (100, 4.0, "power_law"),
        (100, 3.99, "inconclusive"),
        (12, 4.5, "inconclusive"),
        (400, 4.5, "power_law"),
    ],
)
def test_the_elpd_difference_must_be_five_standard_errors_or_four_with_a_hundred_conditions(
    conditions, errors, verdict
):
    found, reason = two(conditions=conditions, elpd=2.0 * errors + 1e-9, error=2.0)
    assert found == verdict
    assert required_errors(conditions) == (4.0 if conditions >= 100 else 5.0)
    if verdict == "inconclusive":
        needed = "4" if conditions >= 100 else "5"
        assert f"fewer than the {needed} needed with {conditions} conditions" in reason


@pytest.mark.parametrize(("factor", "verdict"), [(20.001, "power_law"), (19.9, "inconclusive"), (0.05, "inconclusive")])
def test_the_bayes_factor_must_be_twenty_to_one_in_the_same_direction(factor, verdict):
    found, reason = two(log_bayes=np.log(factor))
    assert found == verdict
    if verdict == "inconclusive":
        assert f"log Bayes factor {np.log(factor):.1f} is below 3.0 (20 to 1)" in reason


def test_twenty_to_one_is_the_margin():
    assert pytest.approx(np.log(20.0)) == LOG_BAYES_MARGIN


def test_a_withheld_bayes_factor_is_not_asked_for_and_the_reason_says_so():
    verdict, reason = two(log_bayes=NAN)
    assert verdict == "power_law"
    assert "withheld" in reason


def test_a_withheld_bayes_factor_does_not_help_a_small_elpd_difference():
    assert two(elpd=3.0, error=0.1, log_bayes=NAN).verdict == "inconclusive"


@pytest.mark.parametrize("width", ["half", "double"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"elpd": 2.5}, "elpd difference 2.5"),
        ({"error": 8.0}, "standard errors"),
        ({"log_bayes": 1.0}, "Bayes factor 1.0"),
    ],
)
def test_a_flip_at_another_prior_width_withholds_the_verdict_and_is_named(width, change, text):
    verdict, reason = two(**{width: change})
    assert verdict == "inconclusive"
    assert text in reason and ("×0.5" if width == "half" else "×2") in reason


def test_an_elpd_difference_that_is_not_a_number_wins_nothing():
    assert two(elpd=NAN).verdict == "inconclusive"
    assert two(error=NAN).verdict == "inconclusive"


def test_an_exact_difference_without_spread_can_win():
    verdict, reason = two(elpd=6.0, error=0.0)
    assert verdict == "power_law" and "inf" in reason


def test_a_law_must_win_against_every_rival():
    pairs = gaps("power_law", "arrhenius") | gaps("power_law", "constant_rate", elpd=3.2)
    pairs |= gaps("constant_rate", "arrhenius", elpd=27.0)
    verdict, reason = decide(check(), [law("power_law"), law("arrhenius"), law("constant_rate")], pairs, 36)
    assert verdict == "inconclusive"
    assert "power_law has the highest elpd" in reason and "against constant_rate the elpd difference 3.2" in reason


def test_the_leader_is_named_even_where_it_is_listed_last():
    verdict, reason = decide(
        check(), [law("arrhenius"), law("power_law")], gaps("power_law", "arrhenius", elpd=3.0), 36
    )
    assert verdict == "inconclusive" and reason.startswith("power_law has the highest elpd")


# --- a law and its generalisation


def family(against_general, **others):
    """The power law inside the noise exponent family, both far better than an Arrhenius law."""
    pairs = gaps("power_law", "noise_exponent", **against_general)
    pairs |= gaps("power_law", "arrhenius", **others) | gaps("noise_exponent", "arrhenius", **others)
    candidates = [law("noise_exponent", special_cases=("power_law",)), law("power_law"), law("arrhenius")]
    return decide(check(), candidates, pairs, 36)


@pytest.mark.parametrize("elpd", [-3.9, 0.0, 0.4, 50.0])
def test_the_simpler_law_stands_against_its_generalisation_without_any_margin(elpd):
    verdict, reason = family({"elpd": elpd, "error": 0.3, "log_bayes": 1.0})
    assert verdict == "power_law"
    assert "stands against its generalisation noise_exponent" in reason


def test_the_simpler_law_stands_where_one_test_of_the_general_one_fails():
    assert family({"elpd": -30.0, "error": 3.0, "log_bayes": -2.0}).verdict == "power_law"
    assert family({"elpd": -30.0, "error": 9.0, "log_bayes": -20.0}).verdict == "power_law"
    flip = {"elpd": -30.0, "error": 3.0, "log_bayes": -20.0, "double": {"elpd": -1.0}}
    assert family(flip).verdict == "power_law"


def test_the_general_law_wins_by_the_full_margins():
    verdict, reason = family({"elpd": -30.0, "error": 3.0, "log_bayes": -20.0})
    assert verdict == "noise_exponent"
    assert "noise_exponent" in reason and "power_law" in reason and "30.0" in reason


def test_a_simpler_law_that_stands_must_still_beat_the_unrelated_ones():
    verdict, reason = family({"elpd": 0.4, "error": 0.3, "log_bayes": 1.0}, elpd=2.0)
    assert verdict == "inconclusive"
    assert "against arrhenius the elpd difference 2.0 is below 4" in reason


def test_the_general_law_does_not_stand_against_its_special_case_by_default():
    """Only the simpler law has the benefit of the doubt: the general one loses a draw."""
    pairs = gaps("power_law", "noise_exponent", elpd=0.1, error=0.3, log_bayes=0.0)
    candidates = [law("power_law"), law("noise_exponent", special_cases=("power_law",))]
    assert decide(check(), candidates, pairs, 36).verdict == "power_law"


# --- the first test that failed


def test_the_first_failing_test_is_reported_in_the_order_of_the_rules():
    weak = Pair(1.0, 3.0, 2.0, 0.1)
    assert "below 4" in shortfall([weak], 36)
    assert "2.5 standard errors" in shortfall([weak._replace(elpd_diff=5.0)], 36)
    assert "Bayes factor 0.1" in shortfall([weak._replace(elpd_diff=50.0)], 36)
    assert shortfall([weak._replace(elpd_diff=50.0, log_bayes_factor=9.0)], 36) == ""


def test_the_first_width_that_fails_is_reported():
    good = Pair(1.0, 50.0, 2.0, 9.0)
    assert shortfall([good, good._replace(width=0.5), good._replace(width=2.0)], 36) == ""
    later = [good, good._replace(width=0.5), good._replace(width=2.0, elpd_diff=3.3)]
    assert shortfall(later, 36) == "the elpd difference 3.3 is below 4 with prior widths ×2"
