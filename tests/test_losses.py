"""The objectives against their formulas in double precision, and their behaviour at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preference.losses import LOSSES, Objective, PairLogps, Totals, log1mexp, objective_share

DTYPES = (torch.float32, torch.float64)


def make_logps(pairs: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> PairLogps:
    draw = torch.Generator().manual_seed(seed)

    def lengths(low: int) -> torch.Tensor:
        return torch.randint(low, 30, (pairs,), generator=draw).to(dtype)

    chosen_len, rejected_len, prompt_len = lengths(1), lengths(1), lengths(0)
    sums = [-n * 3 * torch.rand(pairs, generator=draw, dtype=dtype) for n in (chosen_len, rejected_len, prompt_len)]
    sums = [x.requires_grad_() for x in sums]
    return PairLogps(*sums, chosen_len, rejected_len, prompt_len, torch.ones(pairs, dtype=dtype))


def part(logps: PairLogps, rows: slice | list[int]) -> PairLogps:
    return PairLogps(*(getattr(logps, name)[rows] for name in PairLogps.__dataclass_fields__))


def totals(objective: Objective, logps: PairLogps) -> Totals:
    lengths = zip(logps.prompt_len_B.tolist(), logps.chosen_len_B.tolist(), strict=True)
    return Totals.of(objective, [(int(p) + 1, int(c)) for p, c in lengths])


def reference_of(objective: Objective, pairs: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    draw = torch.Generator().manual_seed(7)
    values = -40 * torch.rand(2, pairs, generator=draw, dtype=torch.float64)
    return tuple(values) if objective.needs_reference else None


def expected(o: Objective, lp: PairLogps, reference: tuple[torch.Tensor, torch.Tensor] | None) -> float:
    """The loss of a whole batch, pair by pair in Python floats, from the papers."""
    log_sigmoid = lambda x: -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))  # noqa: E731
    rows = zip(*(getattr(lp, name).tolist() for name in PairLogps.__dataclass_fields__), strict=True)
    terms, nll_sum, nll_tokens = [], 0.0, 0.0
    for i, (c, r, p, nc, nr, np_, _) in enumerate(rows):
        ref_c, ref_r = (reference[0][i].item(), reference[1][i].item()) if reference else (0.0, 0.0)
        margin, smooth = (c - ref_c) - (r - ref_r), o.label_smoothing
        if o.loss == "orpo":
            odds = [math.exp(x) / (1 - math.exp(x)) for x in (c / nc, r / nr)]
            terms.append(-o.beta * log_sigmoid(math.log(odds[0] / odds[1])))
        elif o.loss in ("dpo", "cpo"):
            terms.append(-(1 - smooth) * log_sigmoid(o.beta * margin) - smooth * log_sigmoid(-o.beta * margin))
        elif o.loss == "robust":
            flipped = smooth * log_sigmoid(-o.beta * margin)
            terms.append((flipped - (1 - smooth) * log_sigmoid(o.beta * margin)) / (1 - 2 * smooth))
        elif o.loss == "simpo":
            x = o.beta * (c / nc - r / nr) - o.simpo_gamma
            terms.append(-(1 - smooth) * log_sigmoid(x) - smooth * log_sigmoid(-x))
        elif o.loss == "ipo":
            terms.append(((c - ref_c) / nc - (r - ref_r) / nr - 1 / (2 * o.beta)) ** 2)
        else:
            terms.append(max(0.0, 1 - o.beta * margin))
        if o.nll_scope == "answer_per_pair" and o.loss == "orpo":
            nll_sum, nll_tokens = nll_sum - c / nc, nll_tokens + 1
        else:
            prompt = (p, np_) if o.loss == "orpo" and o.nll_scope == "sequence" else (0.0, 0.0)
            nll_sum, nll_tokens = nll_sum - c - prompt[0], nll_tokens + nc + prompt[1]
    weight = {"orpo": 1.0, "cpo": o.cpo_alpha}.get(o.loss, 0.0)
    return sum(terms) / len(terms) + weight * nll_sum / nll_tokens


OBJECTIVES = [Objective(loss, beta=0.3) for loss in LOSSES]
OBJECTIVES += [Objective("orpo", beta=0.5, nll_scope=scope) for scope in ("answer", "answer_per_pair")]
OBJECTIVES += [Objective(loss, label_smoothing=0.2) for loss in ("dpo", "robust", "simpo", "cpo")]
OBJECTIVES += [Objective("simpo", beta=2.0, simpo_gamma=0.5), Objective("cpo", cpo_alpha=0.25), Objective(beta=0.0)]


def name(o: Objective) -> str:
    return f"{o.loss}-{o.nll_scope}-{o.beta}-{o.label_smoothing}-{o.simpo_gamma}"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_loss_is_its_formula(objective: Objective) -> None:
    logps = make_logps()
    reference = reference_of(objective, 5)
    loss, _ = objective_share(objective, logps, totals(objective, logps), reference)
    assert loss.item() == pytest.approx(expected(objective, logps, reference), rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
@pytest.mark.parametrize("cut", [[1] * 6, [2, 4], [4, 2], [3, 3]], ids=str)
def test_shares_add_up(objective: Objective, cut: list[int]) -> None:
    """Loss, gradient and metrics of a batch are the sums of its parts', however it is cut and ordered."""
    whole = make_logps(6)
    reference = reference_of(objective, 6)
    inputs = [whole.chosen_B, whole.rejected_B, whole.prompt_B]
    count = totals(objective, whole)
    loss, metrics = objective_share(objective, whole, count, reference)
    gradient = torch.autograd.grad(loss, inputs, allow_unused=True)

    order = torch.randperm(6, generator=torch.Generator().manual_seed(1)).split(cut)
    shares = []
    for rows in order:
        some = None if reference is None else tuple(x[rows] for x in reference)
        shares.append(objective_share(objective, part(whole, rows), count, some))
    total = sum(share for share, _ in shares)
    assert total.item() == pytest.approx(loss.item(), rel=1e-12)
    for a, b in zip(gradient, torch.autograd.grad(total, inputs, allow_unused=True), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-10)
    for key, value in metrics.items():
        assert sum(m[key] for _, m in shares).item() == pytest.approx(value.item(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_zero_weight_pairs_count_for_nothing(objective: Objective) -> None:
    logps = make_logps(4)
    reference = reference_of(objective, 4)
    count = totals(objective, part(logps, slice(0, 3)))
    some = None if reference is None else tuple(x[:3] for x in reference)
    want, want_metrics = objective_share(objective, part(logps, slice(0, 3)), count, some)
    logps.weight_B = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    got, metrics = objective_share(objective, logps, count, reference)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(got, [logps.chosen_B])
    assert gradient[3] == 0
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx({k: v.item() for k, v in want_metrics.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.floats(min_value=-1e4, max_value=0.0, allow_subnormal=True))
def test_log1mexp_is_right_and_finite(dtype: torch.dtype, x: float) -> None:
    value = torch.tensor(x, dtype=dtype, requires_grad=True)
    out = log1mexp(value)
    (gradient,) = torch.autograd.grad(out, value)
    assert torch.isfinite(out) and torch.isfinite(gradient)
    exact = value.detach().double().item()
    if exact < -torch.finfo(dtype).eps:
        tolerance = 8 * torch.finfo(dtype).eps
        want = math.log(-math.expm1(exact)) if exact > -math.log(2) else math.log1p(-math.exp(exact))
        assert out.item() == pytest.approx(want, rel=tolerance, abs=torch.finfo(dtype).tiny)
        assert gradient.item() == pytest.approx(-1 / math.expm1(-exact) if exact > -700 else 0.0, rel=1e3 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x", [0.0, -0.0, -1e-45, -1e-12, -3e-8, -1e-7, 1e-9, -math.log(2), -90.0, -1e5])
def test_log1mexp_at_the_edges(dtype: torch.dtype, x: float) -> None:
    value = torch.tensor([x, -1.0], dtype=dtype, requires_grad=True)
    out = log1mexp(value).sum()
    out.backward()
    assert torch.isfinite(out) and torch.isfinite(value.grad).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
@pytest.mark.parametrize("chosen, rejected", [(0.0, 0.0), (0.0, -5.0), (-5.0, 0.0), (-1e-8, -1e-8), (-1e4, -1e4)])
def test_one_token_answers_at_saturation_are_finite(objective: Objective, chosen: float, rejected: float) -> None:
    one = torch.ones(1)
    sums = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    logps = PairLogps(*sums, torch.zeros(1), one, one, torch.zeros(1), one)
    reference = (torch.zeros(1), torch.zeros(1)) if objective.needs_reference else None
    loss, metrics = objective_share(objective, logps, Totals(1, 1), reference)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in sums)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_metrics_of_a_batch() -> None:
    logps = make_logps()
    _, metrics = objective_share(Objective(beta=0.1), logps, totals(Objective(), logps))
    chosen, rejected = logps.chosen_B / logps.chosen_len_B, logps.rejected_B / logps.rejected_len_B
    assert set(metrics) == {
        "loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "logps/chosen", "logps/rejected",
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    }  # fmt: skip
    assert metrics["rewards/accuracies"].item() == (chosen > rejected).sum().item()
    assert metrics["rewards/margins"].item() == pytest.approx(0.1 * (chosen - rejected).sum().item())
    assert metrics["logps/chosen"].item() == pytest.approx(chosen.sum().item())
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    "wrong",
    [dict(loss="dppo"), dict(nll_scope="all"), dict(label_smoothing=0.5), dict(loss="dpo", beta=0), dict(beta=-1)],
    ids=str,
)
def test_wrong_objectives_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if len(wrong) == 1 else "beta"):
        Objective(**wrong)


def test_reference_where_it_belongs() -> None:
    logps = make_logps()
    with pytest.raises(ValueError, match="takes a reference"):
        objective_share(Objective("dpo"), logps, Totals(5, 5))
    with pytest.raises(ValueError, match="takes no reference"):
        objective_share(Objective("orpo"), logps, Totals(5, 5), (logps.chosen_B, logps.rejected_B))
