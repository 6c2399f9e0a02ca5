"""The objectives against their formulas in double precision, and their behaviour at the edges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preference.losses import LOSSES, NLL_SCOPES, Objective, PairLogps, Totals, couple, log1mexp, objective_share
from preference.losses.answers import weighted_sums

DTYPES = (torch.float32, torch.float64)


FIELDS = tuple(name for name in PairLogps.__dataclass_fields__ if name != "desirable_B")  # of pairs


def make_logps(pairs: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> PairLogps:
    """Random pairs with tails, weights and score margins, as if the data had such columns."""
    draw = torch.Generator().manual_seed(seed)

    def lengths(low: int) -> torch.Tensor:
        return torch.randint(low, 30, (pairs,), generator=draw).to(dtype)

    chosen_len, rejected_len, prompt_len = lengths(1), lengths(1), lengths(0)
    sums = [-n * 3 * torch.rand(pairs, generator=draw, dtype=dtype) for n in (chosen_len, rejected_len, prompt_len)]
    sums = [x.requires_grad_() for x in sums]
    shorter = torch.minimum(chosen_len, rejected_len)
    tails = [x * (1 - shorter / n) for x, n in zip(sums, (chosen_len, rejected_len), strict=False)]
    columns = torch.rand(2, pairs, generator=draw, dtype=dtype)
    return PairLogps(*sums, chosen_len, rejected_len, prompt_len, torch.ones(pairs, dtype=dtype), *tails, *columns)


def part(logps: PairLogps, rows: slice | list[int]) -> PairLogps:
    columns = (getattr(logps, name) for name in FIELDS)
    return PairLogps(*(None if column is None else column[rows] for column in columns))


def totals(objective: Objective, logps: PairLogps) -> Totals:
    lengths = zip(logps.prompt_len_B.tolist(), logps.chosen_len_B.tolist(), strict=True)
    return Totals.of(objective, [(int(p) + 1, int(c)) for p, c in lengths])


def reference_of(objective: Objective, pairs: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    draw = torch.Generator().manual_seed(7)
    values = -40 * torch.rand(2, pairs, generator=draw, dtype=torch.float64)
    return tuple(values) if objective.needs_reference else None


def coupled_of(objective: Objective, logps: PairLogps, reference: tuple | None) -> dict[str, torch.Tensor] | None:
    return couple(objective, weighted_sums(objective, logps), reference) if objective.needs_batch else None


def share(objective: Objective, logps: PairLogps, count: Totals, reference: tuple | None, rows=slice(None), whole=None):
    """`objective_share` of some rows of a batch, whose coupling is that of the whole."""
    coupled = coupled_of(objective, logps if whole is None else whole, reference)
    some = None if reference is None else tuple(x[rows] for x in reference)
    coupled = coupled and {name: values[rows] for name, values in coupled.items()}
    return objective_share(objective, part(logps, rows), count, some, coupled)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def pair_term(o: Objective, loss: str, c: float, r: float, nc: float, nr: float, ref: tuple[float, float], m: float):
    """One pair's preference term in Python floats, from the papers; m is what the pair's scores ask for."""
    beta, smooth = o.beta, o.label_smoothing
    smoothed = lambda x: -(1 - smooth) * log_sigmoid(x) - smooth * log_sigmoid(-x)  # noqa: E731
    ac, ar = c - ref[0], r - ref[1]
    if loss == "orpo":
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (c / nc, r / nr)]
        return -beta * log_sigmoid(o.orpo_temperature * math.log(odds[0] / odds[1]))
    if loss in ("simpo", "cpo_simpo"):
        return smoothed(beta * (c / nc - r / nr) - o.simpo_gamma - m)
    formulas = {
        "sft": lambda: 0.0,
        "simper": lambda: math.exp(r / nr) - math.exp(c / nc),
        "rrhf": lambda: beta * max(0.0, r / nr - c / nc),
        "slic": lambda: max(0.0, beta + m - c + r),
        "cpo": lambda: smoothed(beta * (c - r) - m),
        "dpo": lambda: smoothed(beta * (ac - ar) - m),
        "rpo": lambda: smoothed(beta * (ac - ar) - m),
        "dpop": lambda: smoothed(beta * (ac - ar - o.dpop_lambda * max(0.0, -ac)) - m),
        "rdpo": lambda: smoothed(beta * (ac - ar) - o.length_penalty * (nc - nr) - m),
        "chipo": lambda: smoothed(beta * (ac + math.exp(min(ac, 20)) - ar - math.exp(min(ar, 20))) - m),
    }
    return formulas[loss]()


def expected(o: Objective, lp: PairLogps, reference: tuple[torch.Tensor, torch.Tensor] | None) -> float:
    """The loss of a whole batch, pair by pair."""
    rows = zip(*(getattr(lp, name).tolist() for name in FIELDS), strict=True)
    terms, nll_sum, nll_tokens = 0.0, 0.0, 0.0
    for i, (c, r, p, nc, nr, np_, _, _, _, pair_weight, margin) in enumerate(rows):
        ref = (reference[0][i].item(), reference[1][i].item()) if reference else (0.0, 0.0)
        asked = o.score_margin * margin
        terms += pair_weight * sum(w * pair_term(o, loss, c, r, nc, nr, ref, asked) for loss, w in o.parts)
        if o.nll_scope == "answer_per_pair":
            nll_sum, nll_tokens = nll_sum - pair_weight * c / nc, nll_tokens + 1
        else:
            prompt = (p, np_) if o.nll_scope == "sequence" else (0.0, 0.0)
            nll_sum, nll_tokens = nll_sum - pair_weight * (c + prompt[0]), nll_tokens + nc + prompt[1]
    return terms / len(lp.chosen_B) + o.nll_weight * nll_sum / nll_tokens


BY_HAND = ("orpo", "simpo", "cpo_simpo", "sft", "simper", "rrhf", "slic", "cpo", "dpo", "rpo", "dpop", "rdpo", "chipo")
OBJECTIVES = [Objective(loss, beta=0.3) for loss in LOSSES]
OBJECTIVES += [Objective(loss, score_margin=0.5) for loss in BY_HAND if "score_margin" in LOSSES[loss].reads]
OBJECTIVES += [Objective("dpo", nll_weight=0.5, nll_scope=scope) for scope in NLL_SCOPES]
OBJECTIVES += [Objective("dpo:0.8,cpo:0.2,sft:0.5"), Objective("orpo:2,dpo:0.1"), Objective("kto:0.5,aot:1")]
OBJECTIVES += [
    Objective("orpo", orpo_temperature=3.0),
    Objective("dpop", dpop_lambda=5.0),
    Objective("dpo", ld_alpha=0.3),
]
OBJECTIVES += [Objective("dpo", f_divergence=f) for f in ("forward_kl", "js_divergence", "alpha_divergence")]
OBJECTIVES += [Objective("orpo", beta=0.5, nll_scope=scope) for scope in ("answer", "answer_per_pair")]
OBJECTIVES += [Objective(loss, label_smoothing=0.2) for loss in ("dpo", "robust", "simpo", "cpo")]
OBJECTIVES += [Objective("simpo", beta=2.0, simpo_gamma=0.5), Objective("cpo", cpo_alpha=0.25), Objective(beta=0.0)]


def name(o: Objective) -> str:
    plain = Objective(o.loss, 0.1)
    return "-".join([o.loss, *(f"{f}={v}" for f, v in vars(o).items() if v != getattr(plain, f))])


def by_hand(o: Objective) -> bool:
    return {loss for loss, _ in o.parts} <= set(BY_HAND) and o.ld_alpha == 1 and o.f_divergence == "reverse_kl"


def test_there_are_the_objectives_that_are_promised() -> None:
    names = """orpo dpo robust hinge ipo exo_pair nca_pair bco_pair sppo_hard aot apo_zero apo_down discopop
        sigmoid_norm dpop cpo simpo cpo_simpo alphapo kto rpo sft""".split()
    assert set(names) <= set(LOSSES) and len(LOSSES) >= 25


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if by_hand(o)], ids=name)
def test_loss_is_its_formula(objective: Objective) -> None:
    logps = make_logps()
    reference = reference_of(objective, 5)
    loss, _ = share(objective, logps, totals(objective, logps), reference)
    assert loss.item() == pytest.approx(expected(objective, logps, reference), rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_shares_add_up(objective: Objective) -> None:
    """Loss, gradient and metrics of a batch are the sums of its parts', however it is cut and ordered."""
    whole = make_logps(6)
    reference = reference_of(objective, 6)
    inputs = [whole.chosen_B, whole.rejected_B, whole.prompt_B]
    count = totals(objective, whole)
    loss, metrics = share(objective, whole, count, reference)
    gradient = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)

    for cut in ([1] * 6, [2, 4], [3, 3]):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(1)).split(cut)
        shares = [share(objective, whole, count, reference, rows) for rows in order]
        total = sum(loss for loss, _ in shares)
        assert total.item() == pytest.approx(loss.item(), rel=1e-12)
        for a, b in zip(
            gradient, torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True), strict=True
        ):
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
    want, want_metrics = share(objective, part(logps, slice(0, 3)), count, some)
    coupled = coupled_of(objective, part(logps, slice(0, 3)), some)  # fillers are no part of it
    coupled = coupled and {name: torch.cat([values, values[:1]]) for name, values in coupled.items()}
    logps.weight_B = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    got, metrics = objective_share(objective, logps, count, reference, coupled)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    gradient = torch.autograd.grad(got, [logps.chosen_B, logps.rejected_B], allow_unused=True)
    assert all(side is None or side[3] == 0 for side in gradient)
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


EDGES = ((0.0, 0.0), (0.0, -5.0), (-5.0, 0.0), (-1e-8, -1e-8), (-1e4, -1e4), (-1e4, 0.0), (0.0, -1e4))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_one_token_answers_at_saturation_are_finite(objective: Objective) -> None:
    for chosen, rejected in EDGES:
        assert_finite(objective, chosen, rejected)


def assert_finite(objective: Objective, chosen: float, rejected: float) -> None:
    one = torch.ones(1)
    sums = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    tails = [0.0 * x for x in sums]
    logps = PairLogps(*sums, torch.zeros(1), one, one, torch.zeros(1), one, *tails, one, one)
    reference = (torch.zeros(1), torch.zeros(1)) if objective.needs_reference else None
    loss, metrics = share(objective, logps, Totals(1, 1), reference)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in sums)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_metrics_of_a_batch() -> None:
    logps = make_logps()
    _, metrics = objective_share(Objective(beta=0.1), logps, totals(Objective(), logps))
    chosen, rejected = logps.chosen_B / logps.chosen_len_B, logps.rejected_B / logps.rejected_len_B
    assert set(metrics) == {
        "loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "logps/chosen", "logps/rejected",
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "preference/accuracies", "preference/margins",
    }  # fmt: skip
    assert metrics["rewards/accuracies"].item() == (chosen > rejected).sum().item()
    assert metrics["rewards/margins"].item() == pytest.approx(0.1 * (chosen - rejected).sum().item())
    assert metrics["logps/chosen"].item() == pytest.approx(chosen.sum().item())
    assert metrics["preference/margins"].item() == pytest.approx((chosen - rejected).sum().item())
    assert not any(value.requires_grad for value in metrics.values())


def test_a_tie_is_half_a_win() -> None:
    """A base that is its own reference: every reward is 0; by log-probability per token it has won and lost."""
    logps = make_logps()
    reference = (logps.chosen_B.detach(), logps.rejected_B.detach())
    _, metrics = objective_share(Objective("dpo"), logps, Totals(5, 5), reference)
    assert metrics["rewards/accuracies"].item() == 2.5
    wins = (logps.chosen_B / logps.chosen_len_B > logps.rejected_B / logps.rejected_len_B).sum().item()
    assert metrics["preference/accuracies"].item() == wins not in (0, 2.5, 5)


def test_gradients_are_those_of_the_value() -> None:
    """In double precision by finite differences, from ordinary log-probabilities up to 0 exactly.

    Left out are aot_unpaired, whose value and gradient are split between a pair and its partners, and the kinks of
    the hinges, which the drawn values stay away from.
    """
    for objective in OBJECTIVES:
        if objective.loss == "aot_unpaired":
            continue
        for at in (-3.0, -1e-2, 0.0):
            logps = make_logps(4, seed=3)
            near = (logps.chosen_len_B * at * 0.8 - 0.1, logps.rejected_B.detach() + 0.1)
            reference = near if objective.needs_reference else None
            coupled, count = coupled_of(objective, logps, reference), totals(objective, logps)
            steps = torch.linspace(0.5, 1.0, 4, dtype=torch.float64)
            inputs = [(logps.chosen_len_B * at * steps).requires_grad_(), logps.rejected_B.detach().requires_grad_()]

            def value(c, r, logps=logps, o=objective, count=count, reference=reference, coupled=coupled):
                some = replace(logps, chosen_B=c, rejected_B=r, chosen_tail_B=c / 2, rejected_tail_B=r / 2)
                return objective_share(o, some, count, reference, coupled)[0]

            loss = value(*inputs)
            found = torch.autograd.grad(loss, inputs, allow_unused=True)
            for i, gradient in enumerate(found):
                step = 1e-7 if at else -1e-7  # a log-probability of 0 has but one side
                moved = [x.detach().clone() for x in inputs]
                moved[i] = moved[i] + step * steps
                slope = (value(*moved) - loss) / step
                want = 0.0 if gradient is None else (gradient * steps).sum().item()
                assert math.isfinite(want)
                odd = at == 0 and "orpo" in dict(objective.parts) and i == 0  # log1mexp ends at -eps
                assert odd or slope.item() == pytest.approx(want, rel=2e-4, abs=1e-5), (objective, at, i)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(loss="dppo"), dict(nll_scope="all"), dict(label_smoothing=0.5), dict(beta=-1), dict(loss="dpo", beta=0),
        dict(loss="dpo:0"), dict(loss="dpo:x"), dict(loss="dpo,dpo"), dict(loss="dpo,simpo"), dict(loss="dpo:nan"),
        dict(f_divergence="kl"), dict(ld_alpha=2), dict(orpo_temperature=0), dict(nll_weight=-1),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_objectives_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        Objective(**wrong)


def test_a_sum_of_losses_is_their_sum() -> None:
    logps, reference = make_logps(), reference_of(Objective("dpo"), 5)
    parts = [(Objective("dpo"), 0.8), (Objective("bco_pair"), 0.2), (Objective("sft"), 0.5)]
    found, _ = share(Objective("dpo:0.8,bco_pair:0.2,sft:0.5"), logps, Totals(5, 77), reference)
    each = [share(o, logps, Totals(5, 77), reference if o.needs_reference else None)[0] * w for o, w in parts]
    assert found.item() == pytest.approx(sum(each).item(), rel=1e-12)


def test_known_names_of_other_tools_are_translated() -> None:
    with pytest.raises(ValueError, match="sigmoid is called dpo here"):
        Objective("sigmoid")


def test_columns_that_are_missing_are_named() -> None:
    logps = replace(make_logps(), chosen_tail_B=None, score_margin_B=None)
    for objective, column in (
        (Objective("simpo", score_margin=1), "score_margin"),
        (Objective("dpo", ld_alpha=0), "ld_"),
    ):
        with pytest.raises(ValueError, match=column):
            share(objective, logps, Totals(5, 5), reference_of(objective, 5))


def test_reference_where_it_belongs() -> None:
    logps = make_logps()
    with pytest.raises(ValueError, match="takes a reference"):
        objective_share(Objective("dpo"), logps, Totals(5, 5))
    with pytest.raises(ValueError, match="takes no reference"):
        objective_share(Objective("orpo"), logps, Totals(5, 5), (logps.chosen_B, logps.rejected_B))
