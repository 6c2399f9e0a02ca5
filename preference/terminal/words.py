"""Every message of the screen, in English and in Chinese.

Names of metrics, flags, files and reasons for dropping a row stay as they are: they are typed and searched for.
"""

from __future__ import annotations

WORDS: dict[str, tuple[str, str]] = {
    # ---- before training
    "where": ("where", "设备"),
    "computing": ("computing in {dtype}", "以 {dtype} 计算"),
    "into": ("into {folder}", "写入 {folder}"),
    "template": ("template", "模板"),
    "template_stop": ("{name}, stop text {stop!r}", "{name}，停止符 {stop!r}"),
    "warning": ("warning", "警告"),
    "data": ("data", "数据"),
    "rows": ("{read:,} rows read, {kept:,} kept", "读入 {read:,} 行，保留 {kept:,} 行"),
    "of": ("{kept:,} of {read:,}", "{kept:,} / {read:,}"),
    "dropped": ("{count:,} {reason}, first at line {line}", "{count:,} 行 {reason}，首见于第 {line} 行"),
    "dropped_at": ("dropped {count:,} {reason}, first at {where}", "去除 {count:,} 行 {reason}，首见于 {where}"),
    "dropped_more": (
        "dropped {count:,} for {reasons} other reasons: data_report.json",
        "另有 {count:,} 行因其他 {reasons} 种原因去除：见 data_report.json",
    ),
    "more_files": (
        "and {files} more files with {rows:,} rows: data_report.json",
        "另有 {files} 个文件，{rows:,} 行：见 data_report.json",
    ),
    "more_said": ("and {count} more remarks: data_report.json", "另有 {count} 条说明：见 data_report.json"),
    "note": ("note", "说明"),
    "noted": ("{count:,} x {name}", "{count:,} 次 {name}"),
    "train": ("training", "训练集"),
    "evaluation": ("evaluation", "评估集"),
    "pairs": (
        "{pairs:,} pairs; median tokens: {medians}; none needs more than {longest:,}",
        "{pairs:,} 对；词元中位数：{medians}；最长 {longest:,}",
    ),
    "pairs_short": (
        "{pairs:,} pairs; none needs more than {longest:,} tokens",
        "{pairs:,} 对；最长 {longest:,} 个词元",
    ),
    "singles": (
        "{count:,} single answers, {good:,} of them good; median tokens: {medians}; none needs more than {longest:,}",
        "{count:,} 个单独的回答，其中 {good:,} 个为好；词元中位数：{medians}；最长 {longest:,}",
    ),
    "answers": ("answers", "回答"),
    "length_tells": (
        "length alone tells the answers apart in {share:.0%} of the pairs; a model may learn just that",
        "仅凭长度就能分辨 {share:.0%} 的回答对；模型可能只学到长度",
    ),
    "duplicate_pairs": ("{count:,} pairs stand there more than once", "{count:,} 对重复出现"),
    "contradicting_pairs": (
        "{count:,} pairs are judged both ways round: the same two answers, each better once",
        "{count:,} 对标注自相矛盾：同样的两个回答，各被判为更好一次",
    ),
    "repeated_prompts": (
        "{count:,} rows repeat an earlier prompt with other answers",
        "{count:,} 行重复了先前的提示，但回答不同",
    ),
    "duplicate_pairs_single": ("{count:,} answers stand there more than once", "{count:,} 个回答重复出现"),
    "contradicting_pairs_single": (
        "{count:,} answers are judged both ways: good in one row, bad in another",
        "{count:,} 个回答标注自相矛盾：一行判好，另一行判坏",
    ),
    "repeated_prompts_single": ("{count:,} rows repeat an earlier prompt", "{count:,} 行重复了先前的提示"),
    "near_identical_answers": (
        "{count:,} pairs have nearly the same answer on both sides",
        "{count:,} 对的两个回答几乎相同",
    ),
    "control_text_rows": (
        "{count:,} rows hold text that looks like control tokens or markup",
        "{count:,} 行含有类似控制符或标记的文字",
    ),
    "look_alikes": (
        "{count:,} rows hold control tokens as text; they stay text and end no turn",
        "{count:,} 行的文字中含有控制符；它们只当普通文字，不会结束一轮对话",
    ),
    "first_pair": ("the first pair, as the model sees it", "第一对数据，即模型所见"),
    "first_single": ("the first answer, as the model sees it", "第一个回答，即模型所见"),
    "one_pair": ("one pair", "样例"),
    "one_single": ("one answer", "样例"),
    "pair_head": (
        "{source}: {prompt} prompt tokens; learned: {chosen} tokens of chosen, {rejected} of rejected",
        "{source}：提示 {prompt} 个词元；学习部分：chosen {chosen} 个，rejected {rejected} 个",
    ),
    "pair_short": (
        "{source}; tokens: prompt {prompt}, chosen {chosen}, rejected {rejected}",
        "{source}；词元数：prompt {prompt}，chosen {chosen}，rejected {rejected}",
    ),
    "single_head": (
        "{source}: {prompt} prompt tokens; learned: {chosen} tokens of an answer",
        "{source}：提示 {prompt} 个词元；学习部分：回答 {chosen} 个",
    ),
    "good_answer": ("good answer", "好的回答"),
    "bad_answer": ("bad answer", "差的回答"),
    "learned_between": ("{side} (learned between ⟦ and ⟧)", "{side}（⟦ 与 ⟧ 之间为学习部分）"),
    "tokens": ("tokens", "词元"),
    "characters": ("… ({count} characters) …", "…（{count} 个字符）…"),
    "model": ("model", "模型"),
    "parameters": (
        "{name}, {all:,.1f} M parameters, {trained:,.2f} M trained",
        "{name}，{all:,.1f} M 参数，训练其中 {trained:,.2f} M",
    ),
    "parameters_scored": ("{name}, {all:,.1f} M parameters", "{name}，{all:,.1f} M 参数"),
    "training": ("training", "训练"),
    "of_pairs": ("pairs", "对"),
    "of_singles": ("single answers", "个单独的回答"),
    "training_of": (
        "{pairs:,} {kind}, {batch} per optimizer step, loss={loss}, engine={engine}",
        "{pairs:,} {kind}，每步 {batch}，loss={loss}，engine={engine}",
    ),
    "rate": (
        "beta {beta:g}, learning rate {rate:g} ({source}); beta: {beta_source}",
        "beta {beta:g}，学习率 {rate:g}（{source}）；beta：{beta_source}",
    ),
    "plan": ("plan", "计划"),
    "plan_steps": (
        "{steps:,} steps of {batch} {kind}, some {tokens:,.0f} tokens in all",
        "{steps:,} 步，每步 {batch} {kind}，共约 {tokens:,.0f} 个词元",
    ),
    "plan_time": (
        "no less than {time} at the measured peak of {peak:.3g} TFLOP/s",
        "按实测峰值 {peak:.3g} TFLOP/s，至少需 {time}",
    ),
    "plan_memory": ("{held:.1f} GiB held now, of {limit:.0f}", "现占 {held:.1f} GiB，共 {limit:.0f} GiB"),
    # ---- during training
    "step": ("step", "步"),
    "left": ("left", "剩余"),
    "eval_row": ("eval", "评估"),
    "trained": ("trained {steps} steps in {time}", "训练 {steps} 步，用时 {time}"),
    "evaluation_at": ("{name} at step {step}", "第 {step} 步 {name}"),
    "hint_below_half": (
        "accuracy starts at {accuracy:.0%}, below chance (50%): the model finds the rejected answers likelier, as is "
        "usual where they are in more common words. Training is there to turn it round; watch the trend",
        "准确率从 {accuracy:.0%} 起步，低于随机水平（50%）：模型认为 rejected 更可能，这在其用词更常见时很普遍。"
        "训练正是为了扭转它；请看趋势",
    ),
    "hint_both_fall": (
        "chosen and rejected log-probabilities both fall: normal while the margin grows, as it does. The loss "
        "looks at the difference, and the two answers share words",
        "chosen 与 rejected 的对数概率都在下降：只要间距在增大就属正常，目前正是如此。"
        "损失看的是两者之差，而两个回答有共同的词",
    ),
    "hint_both_fall_alone": (
        "chosen and rejected log-probabilities both fall and the margin does not grow: the model gets worse at "
        "both answers. Try a lower learning_rate",
        "chosen 与 rejected 的对数概率都在下降，而间距没有增大：模型对两个回答都变差。请降低 learning_rate",
    ),
    "hint_nll_rises": (
        "the NLL of the chosen answers rises ({first:.3g} to {last:.3g}): beta or learning_rate is too high, "
        "and the model unlearns to write the answers that it should prefer",
        "chosen 回答的 NLL 在上升（{first:.3g} 到 {last:.3g}）：beta 或 learning_rate 过高，"
        "模型正在忘记如何写出应偏好的回答",
    ),
    "hint_at_chance": (
        "accuracy is still {accuracy:.0%}, chance level: learning_rate is too low, or the pairs differ "
        "in nothing that can be learned (noisy or swapped labels). Read some pairs; look at data_report.json",
        "准确率仍为 {accuracy:.0%}，即随机水平：learning_rate 过低，或数据对之间没有可学的差别（标注有噪声或颠倒）。"
        "请读几对数据，并查看 data_report.json",
    ),
    "hint_below_chance": (
        "accuracy is {accuracy:.0%}, below chance, well into the run: are chosen and rejected the right way round? "
        "Else a higher learning_rate, or more steps",
        "训练已久而准确率为 {accuracy:.0%}，低于随机水平：chosen 与 rejected 是否颠倒？"
        "否则请提高 learning_rate 或增加步数",
    ),
    "hint_eval_rises": (
        "the evaluation loss is up from its best ({best:.4g} at step {step}): the model "
        "begins to overfit the training pairs. Fewer epochs, or the checkpoint of that step, serve better",
        "评估损失已高于最佳值（第 {step} 步的 {best:.4g}）：模型开始过拟合训练数据。减少轮数，或使用该步的检查点更好",
    ),
    "hint_gap": (
        "accuracy is {seen:.0%} on the pairs being trained on and {unseen:.0%} on held-out ones: more "
        "or more varied data helps; more steps do not",
        "训练数据上的准确率为 {seen:.0%}，留出数据上为 {unseen:.0%}：需要更多或更多样的数据，而不是更多步数",
    ),
    "hint_spike": (
        "the loss jumped to {loss:.3g} at step {step}, from about {usual:.3g}: look at the rows of that step, or lower "
        "learning_rate",
        "第 {step} 步损失突增到 {loss:.3g}（此前约 {usual:.3g}）：请查看该步的数据，或降低 learning_rate",
    ),
    # ---- after training
    "metric": ("evaluation", "评估"),
    "before": ("before", "训练前"),
    "after": ("after", "训练后"),
    "change": ("change", "变化"),
    "interval": ("95% interval", "95% 区间"),
    "better": ("better", "变好"),
    "worse": ("worse", "变差"),
    "unsure": ("unclear", "不明显"),
    "loss": ("loss", "损失"),
    "NLL of chosen": ("NLL of chosen", "chosen 的 NLL"),
    "preference accuracy": ("preference accuracy", "偏好准确率"),
    "margin per token": ("margin per token", "每词元间距"),
    "log odds, chosen over rejected": ("log odds, chosen over rejected", "chosen 对 rejected 的对数几率"),
    "reward accuracy": ("reward accuracy", "奖励准确率"),
    "reward margin": ("reward margin", "奖励间距"),
    "KL estimate": ("KL estimate", "KL 估计"),
    "log-probability of chosen": ("log-probability of chosen", "chosen 的对数概率"),
    "log-probability of rejected": ("log-probability of rejected", "rejected 的对数概率"),
    "means preference accuracy": (
        "pairs whose chosen answer has the higher log-probability per token (a tie is half a pair)",
        "chosen 每词元对数概率更高的数据对（持平算半对）",
    ),
    "means margin per token": ("by how much it is higher, in nats", "高出多少，以 nat 计"),
    "means reward accuracy": (
        "pairs whose chosen answer has the higher reward, as the loss defines it (a tie is half a pair)",
        "chosen 奖励更高的数据对，奖励由损失函数定义（持平算半对）",
    ),
    "means reward margin": (
        "by how much the reward of chosen is higher, beta included",
        "chosen 的奖励高出多少，含 beta",
    ),
    "means KL estimate": (
        "what KTO compares rewards with: the mean log-ratio of answers to other prompts, 0 at least",
        "KTO 的参照点：与提示不匹配的回答的平均对数比，不低于 0",
    ),
    "story_accuracy": (
        "Preference accuracy went from {before:.0%} to {after:.0%}.",
        "偏好准确率从 {before:.0%} 变为 {after:.0%}。",
    ),
    "story_rose": (
        "Preference accuracy rose from {before:.0%} to {after:.0%} ({change:+.0f} points, 95% interval {low:+.0f} to "
        "{high:+.0f}).",
        "偏好准确率从 {before:.0%} 升至 {after:.0%}（{change:+.0f} 个百分点，95% 区间 {low:+.0f} 到 {high:+.0f}）。",
    ),
    "story_fell": (
        "Preference accuracy fell from {before:.0%} to {after:.0%} ({change:+.0f} points, 95% interval {low:+.0f} to "
        "{high:+.0f}).",
        "偏好准确率从 {before:.0%} 降至 {after:.0%}（{change:+.0f} 个百分点，95% 区间 {low:+.0f} 到 {high:+.0f}）。",
    ),
    "story_same": (
        "Preference accuracy, {before:.0%} before and {after:.0%} after, did not change beyond chance ({change:+.0f} "
        "points, 95% interval {low:+.0f} to {high:+.0f}).",
        "偏好准确率训练前 {before:.0%}、训练后 {after:.0%}，变化未超出偶然（{change:+.0f} 个百分点，"
        "95% 区间 {low:+.0f} 到 {high:+.0f}）。",
    ),
    "story_not_length": (
        "The gain is not explained by length: among answers of equal length it is {accuracy:.0%}.",
        "提升不是由长度造成的：在等长回答之间为 {accuracy:.0%}。",
    ),
    "story_length": (
        "Length may explain much of the gain: among answers of equal length it is {accuracy:.0%}.",
        "提升可能大部分由长度造成：在等长回答之间为 {accuracy:.0%}。",
    ),
    "story_nll_fell": (
        "The NLL of the chosen answers fell from {before:.2f} to {after:.2f}.",
        "chosen 回答的 NLL 从 {before:.2f} 降至 {after:.2f}。",
    ),
    "story_nll_rose": (
        "The NLL of the chosen answers rose from {before:.2f} to {after:.2f}: the model writes them less readily.",
        "chosen 回答的 NLL 从 {before:.2f} 升至 {after:.2f}：模型更不容易写出它们。",
    ),
    "story_lower": (
        "Try again with a lower learning_rate or beta.",
        "请以更低的 learning_rate 或 beta 重试。",
    ),
    "story_overfits": (
        "It begins to overfit: stop earlier, or train on more pairs.",
        "已开始过拟合：请更早停止，或用更多数据训练。",
    ),
    "story_on": (
        "The loss was still falling at the end: more steps may gain more.",
        "结束时损失仍在下降：更多步数可能带来更多提升。",
    ),
    "story_stop": (
        "The loss had stopped falling: stop here, or bring other pairs.",
        "损失已不再下降：可以到此为止，或换用其他数据。",
    ),
    "story_short": (
        "The log is too short to say whether to train on.",
        "日志太短，无法判断是否应继续训练。",
    ),
    "next": ("next", "接下来"),
    "next_chat": ("talk to it", "与模型对话"),
    "next_report": ("look at the run", "查看本次训练"),
    "next_export": ("take it elsewhere", "导出到别处"),
    "saved": ("saved in {folder}", "已保存到 {folder}"),
    "saved_report": ("saved in {folder}; read {report}", "已保存到 {folder}；请看 {report}"),
    "live": ("live", "实时"),
    "watching": ("watch it at {url}", "实时查看：{url}"),
    # ---- errors
    "error_logged": (
        "{error} (its traceback, versions and command: {path})",
        "{error}（错误详情、版本与命令：{path}）",
    ),
}
