"""Regular expressions in an adapter_config.json: taken as peft takes them, and never waited for without an end."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
from handed_in import SIZES, make_adapter, make_plain

from preference.models import patterns
from preference.models.adapters import check_on_paper, load_adapter
from preference.models.look import ModelError
from preference.models.patterns import check_patterns
from preference.models.sources import SourceError, adapter_config
from tiny import tiny_model

NAMES = ["", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
SLOW = r"([\w.]+)+!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("patterns")
    return make_adapter(out / "adapter", make_plain(out / "plain"))


@pytest.mark.parametrize(
    "entries",
    [{"target_modules": SLOW}, {"exclude_modules": SLOW}, {"modules_to_save": ["lm_head", SLOW]},
     {"layers_pattern": SLOW}, {"rank_pattern": {SLOW: 4}}, {"alpha_pattern": {SLOW: 4}, "modules_to_save": 7}],
    ids=str,
)  # fmt: skip
def test_one_without_an_end_is_refused_by_the_name_of_its_entry(entries: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(ModelError, match=rf"the adapter x: .*\({next(iter(entries))}\) are not done .* after 0.3 s"):
        check_patterns("x", entries, NAMES)
    assert time.monotonic() - began < 30


def test_ordinary_ones_pass_and_broken_ones_are_named() -> None:
    unsloth = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)"
    for good in (unsloth, r"(?i)model\.layers\.\d+\..*_proj", "q_proj"):
        check_patterns(
            "x", {"target_modules": good, "rank_pattern": {"^model.*q_proj": 4}, "modules_to_save": None}, NAMES
        )
    for bad in ("(", "a{2,1}", "*x"):
        with pytest.raises(ModelError, match=r"\(target_modules\) cannot be used: .*error: .*get the adapter anew"):
            check_patterns("x", {"target_modules": bad}, NAMES)


def test_an_adapter_is_asked_before_peft_matches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, chat and export, and in the dry run."""
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    lm, file = partial(tiny_model, **SIZES), folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_modules": r"([\w.]+)+!"}))
    for load in (load_adapter, check_on_paper):
        with pytest.raises(ModelError, match="are not done with the names of the model's layers"):
            load(lm(), str(folder))
    file.write_text(json.dumps(config | {"target_modules": r".*\.(q|v)_proj"}))
    with pytest.raises(ModelError, match="have no place"):  # the adapter is of all layers
        load_adapter(lm(), str(folder))
    file.write_text(json.dumps(config | {"layer_replication": [[0, 2]] * 6_000}))
    with pytest.raises(SourceError, match="layer_replication makes 12,000 layers"):
        adapter_config(str(folder))
