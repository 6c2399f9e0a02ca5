"""peft's kinds of adapters: which change weights, and are trained, merged and exported; which only answer; which do
neither here. A kind that is not listed, a newer peft's say, has not been tried, and is refused.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from preference.models.folder import ModelError
from preference.models.sources import ADAPTER_CONFIG, adapter_config

# A change of weights: each was gone on with to the bit, started DPO at ln 2, was saved, loaded again and merged
CHANGES_WEIGHTS = frozenset(
    "LORA ADALORA BOFT IA3 LOHA LOKR OFT LN_TUNING VERA FROD PVERA FOURIERFT GLORA HRA VBLORA UNILORA MISS RANDLORA "
    "ROAD TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF DELORA GRALORA TINYLORA PSOFT PEANUT SUPERTUNING DEFT".split()
)
# What a kind is that a model can answer with, and that is no change of weights
TOKENS = "tokens before the prompt"
ONLY_ANSWERS = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), TOKENS),
    "ADAPTION_PROMPT": "tokens that attention sees besides",
    "LILY": "a mixture that is drawn for each text as a whole",
    "SHADOW": "a small model that runs beside the layers",
    "BEFT": "biases, for which most layers have no place",
}
UNUSED = {
    "XLORA": "it mixes several adapters by each text: name one of those that it mixes",
    "POLY": "it wants to be told a task with each text",
    "MULTITASK_PROMPT_TUNING": "it wants to be told a task with each text",
    "ADAMSS": "it splits weights by a clustering of scikit-learn's that has not been tried here",
}


def check_kind(folder: str, *, changes: bool) -> None:
    """Whether the adapter of `folder`, or of a hub's id, can be used.

    Args:
        changes: whether it is trained or merged, and so has to be a change of weights.

    Raises:
        ModelError: it is of a kind that cannot, or its config holds what peft would leave out.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = adapter_config(folder) or {}
    kind = str(config.get("peft_type"))
    if kind in ONLY_ANSWERS and changes:
        raise ModelError(
            f"the adapter {folder} is of the kind {kind}: {ONLY_ANSWERS[kind]}, and no change of weights, so it is "
            "neither trained nor merged nor exported here. chat.py answers with it; to train, name its base"
        )
    if kind not in CHANGES_WEIGHTS | ONLY_ANSWERS.keys():
        reason = UNUSED.get(kind, f"it is none that was tried here, with peft {peft.__version__}")
        raise ModelError(f"the adapter {folder} is of the kind {kind} and cannot be used: {reason}; or name its base")
    if re.match("pissa|olora|corda|loftq", str(config.get("init_lora_weights"))):
        raise ModelError(
            f"the adapter {folder} begins in its base's weights (init_lora_weights={config['init_lora_weights']}), and "
            "is no change of the weights that lie there: save it converted (path_initial_model_for_weight_conversion "
            "of peft's save_pretrained); or name its base"
        )
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[getattr(peft.PeftType, kind)])}
    unread = {name: value for name, value in config.items() if name not in known and value}
    if unread:
        said = ", ".join(f"{name} = {value}" for name, value in unread.items())
        raise ModelError(
            f"{Path(folder) / ADAPTER_CONFIG} says {said}, which peft {peft.__version__} does not know and would leave "
            "out: pip install --upgrade peft, or take it out of the file if the adapter is the same without"
        )
