"""Products of few rows: their values in every order of the weight, and that the quick order is taken where it pays."""

from __future__ import annotations

import platform

import pytest
import torch

from rlhf.models.fused import few_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (512, 256), (300, 700)])
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_a_product_has_its_value_whatever_the_weights_order(dtype, shape, rows):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((rows, shape[1]), shape, shape[:1])
    )
    ordered = few_rows.in_order(weight.to(dtype))
    on_this_machine = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    assert ordered.is_mkldnn == (on_this_machine and dtype == torch.float32 and weight.numel() >= 1 << 17)
    limit = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype] * shape[1] ** 0.5
    for added in (bias, None):
        found = few_rows.product(x.to(dtype), ordered, None if added is None else added.to(dtype))
        wanted = x @ weight.t() + (0 if added is None else added)
        assert found.dtype == dtype and float((found.double() - wanted).abs().max()) < 4 * limit


def test_without_onednn_the_weight_stays_a_tensor_of_torch(monkeypatch):
    monkeypatch.setattr(few_rows, "ONEDNN", None)
    weight = torch.randn(512, 512)
    assert not few_rows.in_order(weight).is_mkldnn
    assert torch.equal(few_rows.in_order(weight), weight)
