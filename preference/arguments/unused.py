"""When several flags have no effect, and why."""

from __future__ import annotations

from preference.flags.declaration import Unused

NO_ADAPTER = Unused(lambda a: not a.model.use_peft, "use_peft=false trains all weights, without an adapter")
NO_TRAINING = Unused(lambda a: not a.run.do_train, "do_train=false does not train")
NO_EVALUATION = Unused(lambda a: not a.run.do_eval, "do_eval=false evaluates nothing")
NO_CHECKPOINTS = Unused(lambda a: a.run.save_steps == 0, "save_steps=0 writes no checkpoints")
NOT_ORPO = Unused(lambda a: a.objective.loss != "orpo", "only loss=orpo has it; the other losses take --beta")
NOT_PACKED = Unused(lambda a: a.objective.engine == "trl", "engine=trl cuts batches by pairs and shares no prompts")
