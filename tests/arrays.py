"""Random arrays, and comparing them."""

import torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(found: torch.Tensor | float, expected: torch.Tensor | float, tolerance: float = 1e-10) -> None:
    """Assert that two arrays, or a number for all of one, are equal in float64. Tensors have the same type."""
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
