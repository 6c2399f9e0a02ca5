"""Files of real datasets: how many rows each gives, and what is known of them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from format_rows import CONTAINERS, SHARED, real_samples
from reading import read, write

from preference.data.formats import Options
from preference.data.rows import DataError, DataReport, load_rows

# file: format, rows read, rows kept, dropped: as measured in ../shared/datasets/SCHEMAS.md
SAMPLES = {
    "finemed/finemed_dpo_row0_from_notebook.jsonl": ("trl", 1, 1, {}),
    "hh_rlhf/harmless-base_test.jsonl.gz": (
        "hh", 2312, 2299, {"irregular_turns": 5, "empty_answer": 4, "same_role_turns": 4},
    ),
    "llamafactory/dpo_zh_demo.json": ("sharegpt", 300, 300, {}),
    "llamafactory/v1_dpo_demo.jsonl": ("llamafactory-v1", 10, 10, {}),
    "medicalgpt/dpo_zh_500.conversations.jsonl": ("sharegpt", 500, 500, {}),
    "medicalgpt/dpo_zh_500.triples.jsonl": ("triple", 500, 500, {}),
    "medicalgpt/medical_reward_test.json": ("triple", 100, 100, {}),
    "medicalgpt/toolcall_dpo_zh_demo.jsonl": ("sharegpt", 11, 11, {}),
    "ms_swift/docs_dpo_orpo_examples.jsonl": ("ms-swift", 2, 2, {}),
    "not_preference/beavertails_demo.json": ("", 1, 0, {"not_preference": 1}),
    "not_preference/kto_en_demo.json": ("", 1, 0, {"not_preference": 1}),
    "not_preference/red-team-attempts.jsonl": ("", 1, 0, {"not_preference": 1}),
    "orca_dpo_pairs/orca_dpo_pairs_demo.csv": ("orca", 100, 100, {}),
    "pku_saferlhf/align-anything_preference_train.json": ("", 1, 0, {"choice_needed": 1}),
    "transcribed_rows/argilla_uf_cleaned_row0_TRUNCATED.jsonl": ("ultrafeedback-argilla", 1, 1, {}),
    "transcribed_rows/cvalues_comparison_row_from_card.jsonl": ("cvalues", 1, 1, {}),
    "transcribed_rows/ms_swift_v2_doc_rows.jsonl": ("ms-swift-v2", 1, 0, {"images": 1}),
    "transcribed_rows/shibing624_medical_reward_train_row_TRUNCATED.jsonl": ("triple", 1, 1, {}),
    "transcribed_rows/shp_row_from_card.jsonl": ("shp", 2, 2, {}),
    "transcribed_rows/ultrafeedback_binarized_train_prefs_row0_TRUNCATED.jsonl": (
        "ultrafeedback-binarized", 1, 0, {"tie": 1},
    ),
    "transcribed_rows/ultrafeedback_raw_row53227_TRUNCATED_1of4_completions.jsonl": (
        "ultrafeedback", 1, 0, {"too_few_candidates": 1},
    ),
    "trl_formats/conversational_implicit_prompt_preference.jsonl": ("trl-implicit-messages", 19, 19, {}),
    "trl_formats/conversational_preference.jsonl": ("trl", 19, 19, {}),
    "trl_formats/conversational_unpaired_preference.jsonl": ("", 1, 0, {"not_preference": 1}),
    "trl_formats/standard_implicit_prompt_preference.jsonl": ("trl-implicit-text", 19, 19, {}),
    "trl_formats/standard_preference.jsonl": ("trl", 19, 19, {}),
    "trl_formats/standard_unpaired_preference.jsonl": ("", 1, 0, {"not_preference": 1}),
    "zhongjing/rlhf_label_tool_input_file.json": ("", 1, 0, {"not_preference": 1}),
    "zhongjing/rlhf_label_tool_output_result.tsv": ("", 1, 0, {"ambiguous_format": 1}),
    "zhongjing/zhongjing_total_dataset.tsv": ("", 1, 0, {"ambiguous_format": 1}),
}  # fmt: skip


@real_samples
@pytest.mark.parametrize("file", SAMPLES)
def test_real_sample(file):
    name, rows_read, rows_kept, dropped = SAMPLES[file]
    rows, report = read(SHARED / file)
    assert (report.rows_read, len(rows), dict(report.dropped)) == (rows_read, rows_kept, dropped)
    assert next(iter(report.files.values()))["format"] == name


@real_samples
def test_every_real_sample_is_listed():
    found = {str(path.relative_to(SHARED)) for path in SHARED.rglob("*") if path.is_file() and path.suffix != ".md"}
    assert found == set(SAMPLES)


@real_samples
def test_real_facts():
    triples, _ = read(SHARED / "medicalgpt/dpo_zh_500.triples.jsonl")
    conversations, _ = read(SHARED / "medicalgpt/dpo_zh_500.conversations.jsonl")
    assert triples == [replace(row, file=triples[0].file) for row in conversations]
    assert sum(row.system is not None for row in triples) == 84
    assert triples[0].question == '20个关于新鲜果汁菜单的口号，适用于一家名为"Dishes"的餐厅'
    sharegpt, _ = read(SHARED / "llamafactory/dpo_zh_demo.json")
    assert sum(row.system is not None for row in sharegpt) == 64 and not any(row.history for row in sharegpt)
    orca, report = read(SHARED / "orca_dpo_pairs/orca_dpo_pairs_demo.csv")
    assert sum(row.system is None for row in orca) == 8 and report.notes["leading_space_in_rejected_only"] == 100
    hh, _ = read(SHARED / "hh_rlhf/harmless-base_test.jsonl.gz")
    assert 0.69 < sum(bool(row.history) for row in hh) / len(hh) < 0.73
    with pytest.raises(DataError, match="disagree in 19 of 32 rows"):
        load_rows([SHARED / "pku_saferlhf"], DataReport())
    _, report = read(SHARED / "pku_saferlhf", options=Options(axis="safer"))
    assert report.rows_kept == 32 and report.notes["both_unsafe"] == 16
    shp, _ = read(SHARED / "transcribed_rows/shp_row_from_card.jsonl")
    assert shp[0].chosen.startswith("Pectinex") and shp[1].chosen.startswith("It's ironic")
    v1, _ = read(SHARED / "llamafactory/v1_dpo_demo.jsonl")
    assert v1[1].chosen == "D: considerate" and v1[1].system.startswith("You are an AI assistant")


@real_samples
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("file", [file for file, entry in SAMPLES.items() if entry[2] and "hh_rlhf" not in file])
def test_real_sample_out_of_every_container(tmp_path, file, container):
    plain = SHARED / file
    if plain.suffix == ".csv":
        with open(plain, encoding="utf-8", newline="") as stream:
            originals = list(csv.DictReader(stream))
    else:
        text = plain.read_text(encoding="utf-8")
        one_a_line = not text.startswith("[")
        originals = [json.loads(line) for line in text.split("\n") if line] if one_a_line else json.loads(text)
    expected, _ = read(plain)
    rows, _ = read(write(tmp_path, CONTAINERS[container](originals), container))
    assert [(r.system, r.history, r.question, r.prompt, r.chosen, r.rejected) for r in rows] == [
        (r.system, r.history, r.question, r.prompt, r.chosen, r.rejected) for r in expected
    ]
