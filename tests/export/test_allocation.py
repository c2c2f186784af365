"""Budgets in words, and the knapsack against all there is."""

import itertools

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import SpecError
from export import allocation
from export.allocation import Choice, pareto_front
from export.budget import Budget, parse_budget
from export.choose_recipe import Sizes, choose, group_bytes, recipe_text
from export.recipe import load_recipe

FORMATS = ("none", "fp8", "nvfp4")
number = st.floats(0, 1, allow_nan=False)
choice = st.builds(Choice, format=st.sampled_from(FORMATS), num_bytes=st.integers(0, 40), error=number)
tables = st.lists(st.lists(choice, min_size=1, max_size=3), min_size=1, max_size=5).map(
    lambda rows: {f"g{number}": row for number, row in enumerate(rows)}
)


def everything(table):
    """(bytes, error) of every allocation there is. Errors are added in the order in which the front adds them."""
    return [
        (sum(one.num_bytes for one in row), float(np.cumsum([0.0, *(one.error for one in row)])[-1]))
        for row in itertools.product(*table.values())
    ]


@given(tables, st.integers(0, 200))
def test_the_least_error_within_a_size_is_that_of_brute_force(table, limit):
    fitting = [pair for pair in everything(table) if pair[0] <= limit]
    front = pareto_front(table)
    state = front.least_error(limit)
    assert (state is None) == (not fitting)
    if state is not None:
        assert front.error[state] == min(error for _, error in fitting)
        found = front.allocation(state)
        assert list(found) == list(table)
        assert all(found[group] in table[group] for group in table)
        assert sum(one.num_bytes for one in found.values()) == front.num_bytes[state] <= limit
        assert float(np.cumsum([0.0, *(one.error for one in found.values())])[-1]) == front.error[state]


@given(tables, st.floats(0, 5))
def test_the_least_size_within_an_error_is_that_of_brute_force(table, limit):
    fitting = [pair for pair in everything(table) if pair[1] <= limit]
    front = pareto_front(table)
    state = front.least_bytes(limit)
    assert (state is None) == (not fitting)
    if state is not None:
        assert front.num_bytes[state] == min(num_bytes for num_bytes, _ in fitting)


def test_a_thinned_front_never_overruns_and_keeps_its_ends(monkeypatch):
    rng = np.random.default_rng(0)
    table = {
        f"g{i}": [
            Choice(format=f, num_bytes=int(b), error=float(e))
            for f, b, e in zip(FORMATS, sorted(rng.integers(1, 10**6, 3)), sorted(rng.random(3))[::-1], strict=True)
        ]
        for i in range(12)
    }
    exact = pareto_front(table)
    monkeypatch.setattr(allocation, "MAX_FRONT", 40)
    thin = pareto_front(table)
    assert len(thin) <= 40 < len(exact)
    assert (thin.num_bytes[0], thin.error[-1]) == (exact.num_bytes[0], exact.error[-1])  # both ends stay
    for limit in np.linspace(exact.num_bytes[0], exact.num_bytes[-1], 20):
        state, best = thin.least_error(limit), exact.least_error(limit)
        assert sum(one.num_bytes for one in thin.allocation(state).values()) == thin.num_bytes[state] <= limit
        assert exact.error[best] <= thin.error[state]


@pytest.mark.parametrize("error", [-1.0, float("nan"), float("inf")])
def test_errors_that_are_no_numbers(error):
    with pytest.raises(ValueError, match="g: got the errors"):
        pareto_front({"g": [Choice(format="fp8", num_bytes=1, error=error)]})


@given(st.dictionaries(st.sampled_from(list(Budget.model_fields)), st.floats(1e-6, 1e6), min_size=1))
def test_a_budget_in_words_is_read_back(values):
    budget = Budget(**values)
    spaced = " , ".join(f"{m} {'>=' if m == 'psnr_db' else '<='} {value!r}" for m, value in values.items())
    assert parse_budget(spaced) == budget
    assert parse_budget(str(budget)).model_fields_set == set(values)


@given(st.text(max_size=30))
def test_any_other_text_is_an_error_that_says_so(text):
    try:
        found = parse_budget(text)
    except SpecError as error:
        message = str(error)
    else:
        assert found.model_fields_set
        return
    assert message.startswith("budget: got ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected clauses"),
        ("lpips", "got 'lpips'; expected clauses"),
        ("lpip<=0.1", "did you mean 'lpips'"),
        ("lpips>=0.1", "expected lpips<=number"),
        ("psnr_db<=30", "expected psnr_db>=number"),
        ("lpips<0.1", "expected lpips<=number"),
        ("lpips<=x", "expected a finite number above 0"),
        ("lpips<=nan", "expected a finite number above 0"),
        ("size<=0", "expected a finite number above 0"),
        ("size<=1e999", "expected a finite number above 0"),
        ("size<=0.4,size<=0.3", "got size twice"),
        ("size<=0.4,", "got ''"),
    ],
)
def test_bad_budgets(text, words):
    with pytest.raises(SpecError, match=words):
        parse_budget(text)


def test_what_is_missed_is_said():
    budget = parse_budget("lpips<=0.08, psnr_db>=20")
    assert budget.missed({"lpips": 0.08, "psnr_db": 20}) == []
    assert budget.missed({"lpips": 0.09, "psnr_db": 21}) == ["lpips: got 0.09; expected <= 0.08"]
    assert len(budget.missed({"lpips": float("nan")})) == 2


SIZES = Sizes(fixed=100, half=100 + 10 * 200)
TABLE = {
    f"transformer_blocks.{block}.attn2.to_q": [
        Choice(format="none", num_bytes=200, error=0.0),
        Choice(format="fp8", num_bytes=100, error=0.01 * (block + 1)),
        Choice(format="nvfp4", num_bytes=60, error=0.1 * (block + 1)),
    ]
    for block in range(10)
}


def error_of(formats):
    return {"error": sum(one.error for group, kind in formats.items() for one in TABLE[group] if one.format == kind)}


def pictures(formats):
    """A made-up distance that gets worse with the error of latents."""
    return {"lpips": 0.02 * error_of(formats)["error"] ** 0.5}


def test_a_size_is_filled_with_the_least_error():
    chosen = choose(TABLE, SIZES, parse_budget("size<=0.5"), error_of)
    assert chosen.measured["size"] <= 0.5
    assert chosen.measured["error"] == pytest.approx(pareto_front(TABLE).error[pareto_front(TABLE).least_error(950)])
    kinds = [one.format for one in chosen.allocation.values()]
    assert kinds == sorted(kinds, key=("nvfp4", "fp8", "none").index)  # later blocks are more sensitive, and get more


def test_a_budget_of_pictures_takes_the_smallest_that_was_measured_to_hold():
    tried = []

    def measure(formats):
        tried.append(pictures(formats))
        return tried[-1]

    chosen = choose(TABLE, SIZES, parse_budget("lpips<=0.01"), measure)
    assert chosen.measured["lpips"] <= 0.01
    assert len(tried) <= 7
    front = pareto_front(TABLE)
    smallest = min(SIZES.ratio(front.allocation(state)) for state in range(len(front)) if 0.02 * front.error[state] ** 0.5 <= 0.01)
    assert chosen.measured["size"] <= smallest + 0.05


def test_a_budget_that_cannot_be_met_names_who_stands_in_the_way():
    with pytest.raises(SpecError, match=r"the smallest that the formats allow is size 0\.3333.*transformer_blocks\.0"):
        choose(TABLE, SIZES, parse_budget("size<=0.3"), error_of)
    with pytest.raises(
        SpecError, match=r"cannot be met: lpips: got .*; expected <= 0\.001\. In the way.*transformer_blocks\.9\.attn2\.to_q"
    ):
        choose(TABLE, SIZES, parse_budget("size<=0.5, lpips<=0.001"), pictures)


def test_bytes():
    assert group_bytes("none", 64, 32) == 4096
    assert group_bytes("fp8", 64, 32) == 2048 + 256
    assert group_bytes("nvfp4", 64, 32, rank=4, smooth=True) == 1024 + 128 + 4 + 2 * 4 * 96 + 64


def test_a_chosen_recipe_is_read_back(tmp_path):
    recipe = load_recipe("nvfp4", ["calibration.steps=4", "calibration.sizes=[[64,64]]"])
    budget = parse_budget("size<=0.5")
    chosen = choose(TABLE, SIZES, budget, error_of)
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text(recipe, chosen, SIZES, budget, "sana-tiny"), encoding="utf-8")
    read = load_recipe(path)
    assert read.model_copy(update={"formats": ()}) == recipe
    assert read.formats_of(list(TABLE)) == {group: one.format for group, one in chosen.allocation.items()}
    decisions = [line for line in path.read_text().splitlines() if line.startswith("  - {groups")]
    assert len(decisions) == 10
    assert all("# error " in line for line in decisions)
    assert set(yaml.safe_load(path.read_text())) == set(type(recipe).model_fields)
