"""Sample answers: which questions are asked, and how an answer ends that was cut."""

from __future__ import annotations

import torch

from preference.report.answers import _of_the_commonest_script
from preference.report.tables import comparison, greedy_answers
from tiny import tiny_tokenizer


def test_questions_are_in_the_commonest_script():
    assert _of_the_commonest_script(["How?", "怎么办？", "Why?", "12"]) == [0, 2]
    assert _of_the_commonest_script(["怎么办？"]) == [0]


def test_an_answer_cut_inside_a_character_ends_before_it():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Drink 茶", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")

    class Cut(torch.nn.Linear):
        device = "cpu"

        def generate(self, input_ids, **_):
            return torch.cat([input_ids, torch.tensor([ids[:-1]])], dim=1)

    model = Cut(1, 1)
    assert greedy_answers(model, tokenizer, [[5, 6]], [0], 8) == ["Drink"]


def test_one_name_for_one_meaning():
    """Rewards that are log-probabilities per token times beta have no lines; those of a log-ratio are told apart."""

    def metrics(accuracy, margin, reward_accuracy, reward_margin):
        values = {"loss": 1.0, "preference/accuracies": accuracy, "preference/margins": margin}
        values |= {"rewards/accuracies": reward_accuracy, "rewards/margins": reward_margin}
        return {f"eval_{name}": value for name, value in values.items()}

    orpo = comparison(metrics(0.3, -0.2, 0.3, -0.02), metrics(0.8, 0.4, 0.8, 0.04))
    assert "reward" not in orpo and "(preference accuracy: pairs whose chosen answer" in orpo
    dpo = comparison(metrics(0.3, -0.2, 0.5, 0.0), metrics(0.4, -0.1, 0.9, 2.0))
    assert "reward accuracy" in dpo and "beta included" in dpo and "50.0%" in dpo
