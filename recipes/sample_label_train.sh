#!/bin/sh
# One round of on-policy tuning: the model answers each question several times, a judge says which answers are better, and
# the model is trained on its own best against its own worst. Again with model_name_or_path=outputs/round for the next round.
#   questions=my_questions.txt judge=http://127.0.0.1:8000/v1 sh recipes/sample_label_train.sh
# judge: an OpenAI-compatible server or a model of this machine; a reward model is named with reward=MODEL instead. A round that
# was stopped goes on where it was. Sampling needs some 500 questions that are not those of your evaluation.
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-Qwen/Qwen2.5-1.5B-Instruct}" template_name="${template_name:-auto}"
questions="${questions:-questions.txt}" output_dir="${output_dir:-outputs/round}" pairs="${pairs:-$output_dir.pairs.jsonl}"
if [ -n "${reward:-}" ]; then set_scorer="--reward" scorer=$reward; else set_scorer="--judge" scorer="${judge:-$model_name_or_path}"; fi
PYTHON=$(sh setup.sh) || exit 1
export PYTHON model_name_or_path template_name output_dir
[ -e "$pairs" ] || "$PYTHON" make_pairs.py "$questions" --model "$model_name_or_path" "$set_scorer" "$scorer" --output "$pairs" || exit 1
train_file_dir="$pairs" validation_file_dir="${validation_file_dir:-data/eval}" loss="${loss:-dpo}" exec sh run_orpo.sh "$@"
