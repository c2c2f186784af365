"""The one bound that every faster or narrower version of a computation is held to."""

import torch

__all__ = ["assert_parity"]


def assert_parity(got: torch.Tensor, *, same: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """`got` may err at most twice as much as `same`, PyTorch's answer at the tested precision, against `exact`, the wide answer.

    Three measures of the error, so that neither an outlier nor a bias can hide: the maximum and the root mean square at most twice
    PyTorch's, and the mean within a quarter of the bound on the root mean square. All three tensors have one shape and come from
    the same inputs. No less error is asked for than storing the exact answer in `same`'s dtype costs.
    """
    assert got.shape == exact.shape == same.shape, f"{name}: got shape {tuple(got.shape)}; expected {tuple(exact.shape)}"
    exact = exact.double()

    def errors(x: torch.Tensor) -> tuple[float, float, float]:
        error = x.double() - exact
        return error.abs().max().item(), error.square().mean().sqrt().item(), error.mean().item()

    biggest, rms, mean = errors(got)
    peer_biggest, peer_rms, _ = errors(same)
    least_biggest, least_rms, _ = errors(exact.to(same.dtype))
    bound_biggest, bound_rms = 2 * max(peer_biggest, least_biggest), 2 * max(peer_rms, least_rms)
    bound_mean = bound_rms * max(0.25, 3 / exact.numel() ** 0.5)  # of few values the mean is off by chance: 3 standard deviations
    # Written so that NaN, which compares false, fails too.
    assert biggest <= bound_biggest and rms <= bound_rms and abs(mean) <= bound_mean, (  # noqa: PT018 one message for the three
        f"{name}: got errors max {biggest:.2e}, rms {rms:.2e}, mean {mean:+.1e}; expected at most {bound_biggest:.2e}, "
        f"{bound_rms:.2e}, ±{bound_mean:.1e}: twice PyTorch's {peer_biggest:.2e} and {peer_rms:.2e} in {same.dtype} "
        f"(storing the exact answer costs {least_biggest:.2e} and {least_rms:.2e})"
    )
