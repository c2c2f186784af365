"""The timestep distributions against their closed forms, and the loss against its definition."""

import math

import pytest
import torch
from pydantic import ValidationError

from train.objective.flow import Draw, draw, flow_loss
from train.objective.place import Place
from train.objective.settings import Custom, LogitNormal, Mode, ObjectiveSettings, Uniform
from train.objective.timesteps import loss_weight, quantile, shift

NUM = 20_000
CRITICAL = 1.628  # Kolmogorov-Smirnov at 1 %: sup |F_n - F| sqrt(n)


def triangle_cdf(t):
    """Of the density that rises from 0 at 0.2 to its top at 0.6 and falls to 0 at 1."""
    rise, fall = (t - 0.2).clamp(0, 0.4), (t - 0.6).clamp(0, 0.4)
    return rise.square() / 0.32 + (fall / 0.4 - fall.square() / 0.32)


def mode_cdf(scale):
    def cdf(t):  # the inverse of the paper's f, by bisection: f falls with u
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            u = (low + high) / 2
            above = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u) > t
            low, high = torch.where(above, u, low), torch.where(above, high, u)
        return 1 - low

    return cdf


CASES = {
    "uniform": (Uniform(), lambda t: t),
    "logit_normal": (LogitNormal(), lambda t: torch.special.ndtr(torch.logit(t))),
    "logit_normal_moved": (LogitNormal(mean=0.5, std=0.7), lambda t: torch.special.ndtr((torch.logit(t) - 0.5) / 0.7)),
    "mode": (Mode(scale=1.29), mode_cdf(1.29)),
    "mode_ends": (Mode(scale=-0.8), mode_cdf(-0.8)),
    "custom": (Custom(points=((0.2, 0), (0.6, 3), (1, 0))), triangle_cdf),
    "custom_flat": (Custom(points=((0.25, 2), (0.75, 2))), lambda t: (2 * t - 0.5).clamp(0, 1)),
    "custom_gap": (  # half of the mass on each side of an empty middle
        Custom(points=((0, 1), (0.25, 1), (0.250001, 0), (0.75, 0), (0.750001, 1), (1, 1))),
        lambda t: 2 * t.clamp(max=0.25) + 2 * (t - 0.75).clamp(min=0),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("flow_shift", [1.0, 3.0])
def test_samples_follow_their_distribution(name, flow_shift):
    distribution, cdf = CASES[name]
    settings = ObjectiveSettings(timesteps=distribution, flow_shift=flow_shift)
    drawn = draw(settings, (NUM, 1, 1, 1), Place(seed=5, step=3, micro_batch=1))
    t = drawn.t.double().sort().values
    assert ((t >= 0) & (t <= 1)).all()
    unshifted = t / (flow_shift - (flow_shift - 1) * t)
    expected, ranks = cdf(unshifted), torch.arange(NUM, dtype=torch.float64)
    distance = torch.maximum((ranks + 1) / NUM - expected, expected - ranks / NUM).max().item()
    assert distance * math.sqrt(NUM) < CRITICAL


def test_moments():
    def mean_and_variance(distribution):
        t = quantile(distribution, (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
        return t.mean().item(), t.var().item()

    assert mean_and_variance(Uniform()) == pytest.approx((1 / 2, 1 / 12), rel=1e-4)
    assert mean_and_variance(CASES["custom"][0]) == pytest.approx((0.6, 0.16 / 6), rel=1e-4)  # half width 0.4: w**2 / 6
    assert mean_and_variance(LogitNormal())[0] == pytest.approx(0.5, rel=1e-6)  # symmetric


def test_quantiles_of_the_ends_are_finite():
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for distribution, _ in CASES.values():
        t = quantile(distribution, u)
        assert torch.isfinite(t).all()
        assert t[0] < t[1]


def test_shift_is_the_published_one():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift(t, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert torch.equal(shift(t, 1.0), t)


def test_weights():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    of = {name: loss_weight(ObjectiveSettings(weighting=name), t) for name in ("none", "sigma_sqrt", "cosmap", "min_snr")}
    assert of["none"].tolist() == [1, 1, 1]
    torch.testing.assert_close(of["sigma_sqrt"], torch.tensor([100, 4, 1 / 0.81], dtype=torch.float64))
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    area = torch.trapezoid(loss_weight(ObjectiveSettings(weighting="cosmap"), grid), grid)
    assert area.item() == pytest.approx(1, rel=1e-6)  # it is a density
    # t**2 min(SNR, 5), by its definition
    torch.testing.assert_close(of["min_snr"], t**2 * (((1 - t) / t) ** 2).clamp(max=5))


def test_random_numbers_are_a_function_of_the_step_alone():
    settings, shape = ObjectiveSettings(caption_dropout=0.5), (4, 2, 3, 3)
    first = draw(settings, shape, Place(seed=1, step=7, micro_batch=0))
    torch.rand(100)
    again = draw(settings, shape, Place(seed=1, step=7, micro_batch=0))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("t", "noise", "keep"))
    places = [{"seed": s, "step": n, "micro_batch": m, "rank": r} for s in (1, 2) for n in (7, 70) for m in (0, 1) for r in (0, 1)]
    assert len({Place(**place).hashed() for place in places}) == len(places)


def test_captions_are_dropped_as_often_as_asked():
    for share in (0.0, 0.1, 1.0):
        keep = draw(ObjectiveSettings(caption_dropout=share), (NUM, 1, 1, 1), Place(seed=0, step=0, micro_batch=0)).keep
        assert (~keep).double().mean().item() == pytest.approx(share, abs=4 * math.sqrt(0.09 / NUM))


def test_loss_is_that_of_the_definition():
    batch = {
        "latents": torch.randn(2, 3, 4, 4),
        "prompt_embeds": torch.randn(2, 5, 6),
        "prompt_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }
    drawn = Draw(t=torch.tensor([0.25, 0.5]), noise=torch.randn(2, 3, 4, 4), keep=torch.tensor([True, False]))
    seen = {}

    def model(latents, text, timestep, mask):
        seen.update(latents=latents, timestep=timestep, mask=mask)
        return latents * 0

    loss = flow_loss(model, batch, drawn, ObjectiveSettings(weighting="sigma_sqrt"))
    target = drawn.noise - batch["latents"]
    torch.testing.assert_close(loss, (16 * target[0].square().mean() + 4 * target[1].square().mean()) / 2)
    torch.testing.assert_close(seen["latents"][0], 0.75 * batch["latents"][0] + 0.25 * drawn.noise[0])
    assert seen["timestep"].tolist() == [250, 500]
    assert seen["mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"caption_dropout": 1.5},
        {"flow_shift": 0},
        {"weighting": "snr"},
        {"colour": "red"},
        {"timesteps": {"kind": "normal"}},
        {"timesteps": {"kind": "mode", "scale": 1.8}},
        {"timesteps": {"kind": "logit_normal", "std": 0}},
        {"timesteps": {"kind": "custom", "points": [(0, 1)]}},
        {"timesteps": {"kind": "custom", "points": [(0, 1), (0, 1)]}},
        {"timesteps": {"kind": "custom", "points": [(0, 0), (1, 0)]}},
        {"timesteps": {"kind": "custom", "points": [(0, 2), (1, -1)]}},
        {"timesteps": {"kind": "custom", "points": [(0, 2), (1.5, 1)]}},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        ObjectiveSettings(**wrong)


def test_settings_are_read_by_kind():
    read = ObjectiveSettings.model_validate({"timesteps": {"kind": "custom", "points": [[0, 1], [1, 2]]}})
    assert read.timesteps == Custom(points=((0, 1), (1, 2)))
    assert ObjectiveSettings.model_validate(read.model_dump(mode="json")) == read
