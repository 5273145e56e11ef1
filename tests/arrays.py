"""Random arrays, and comparing them."""

import torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(found: torch.Tensor | float, expected: torch.Tensor | float, tolerance: float = 1e-10) -> None:
    """Assert that two arrays are equal in float64, whatever their types are."""
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
