"""What columns are called, in one place: questions, system texts, contexts, the two sides, scores, metadata.

Names are compared in the form of `key_of`: any letter case, with spaces, hyphens, dots or camel case for underscores,
English and Chinese. Nothing here looks at a value.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NOT_WORD = re.compile(r"[\W_]+")


@lru_cache(maxsize=4096)
def key_of(name: str) -> str:
    """`Chosen Answer`, `chosen-answer`, `chosenAnswer` and `chosen_answer` as one name."""
    folded = _CAMEL.sub("_", unicodedata.normalize("NFKC", str(name))).casefold()
    return _NOT_WORD.sub("_", folded).strip("_")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Columns that hold the question wherever they stand; where two of them do, the user has to say which
QUESTIONS = _names(
    """prompt question query instruction human ask user_input user_prompt user_query user_question user_message
    user_request prompt_text question_text query_text instruction_text input_text
    问题 提问 提示 提示词 指令 问句 用户问题 用户输入 题目 质问"""
)
# Columns that hold it where nothing else does
WEAK_QUESTIONS = _names(
    """input inputs context problem post task dialogue dialog dialogues request body message messages src
    context_messages prompt_messages input_messages trajectory conversation conversations contents user
    conversation_history chat_history dialogue_history statement x 输入 任务 对话 上下文 用户 病情描述 主诉"""
)
SYSTEMS = _names(
    """system system_prompt system_message system_msg system_text system_instruction system_instructions sys sys_prompt
    systemprompt systemmessage 系统 系统提示 系统提示词 系统消息 系统指令"""
)
HISTORIES = _names(
    """history chat_history conversation_history dialogue_history dialog_history past_messages previous_messages
    previous_turns 历史 历史对话 对话历史 历史记录"""
)
CONTEXTS = _names(
    """context contexts background passage passages document documents article knowledge evidence paragraph
    source_text context_text retrieved_context retrieved_documents 上下文 背景 背景信息 资料 文章 材料"""
)
INPUTS = _names("input inputs 输入")  # goes behind an instruction, as in alpaca's rows
OPTIONS = _names("options choices answer_choices answer_options 选项")
CANDIDATES = _names(
    """response responses answer answers output outputs completion completions candidate candidates generation
    generations reply replies summary summaries samples generated_responses generated_answers 回答 回复 答案 候选
    候选回答 回答列表"""
)

_SIDES = (
    ("chosen", "rejected"), ("chosen", "reject"), ("chosen", "unchosen"), ("choosen", "rejected"),
    ("preferred", "rejected"), ("preferred", "other"), ("preferred", "dispreferred"), ("preferred", "nonpreferred"),
    ("preferred", "non_preferred"), ("preferred", "not_preferred"), ("preferred", "unpreferred"),
    ("preferred", "less_preferred"), ("more_preferred", "less_preferred"), ("better", "worse"), ("best", "worst"),
    ("positive", "negative"), ("pos", "neg"), ("good", "bad"), ("win", "lose"), ("win", "loss"), ("win", "los"),
    ("winning", "losing"), ("winner", "loser"), ("won", "lost"), ("w", "l"), ("yw", "yl"), ("y_w", "y_l"),
    ("accepted", "rejected"), ("accept", "reject"), ("approved", "rejected"), ("selected", "rejected"),
    ("selected", "unselected"), ("superior", "inferior"), ("favored", "disfavored"), ("favoured", "disfavoured"),
    ("desirable", "undesirable"), ("desired", "undesired"), ("upvoted", "downvoted"), ("liked", "disliked"),
    ("correct", "incorrect"), ("right", "wrong"), ("high_quality", "low_quality"), ("strong", "weak"),
    ("优选", "拒绝"), ("优选", "劣选"), ("优选", "次选"), ("首选", "拒绝"), ("首选", "次选"), ("选择", "拒绝"),
    ("选中", "拒绝"), ("选中", "未选中"), ("接受", "拒绝"), ("采纳", "拒绝"), ("采纳", "未采纳"), ("好", "坏"),
    ("好的", "坏的"), ("好的", "差的"), ("好", "差"), ("更好", "更差"), ("更好的", "更差的"), ("较好", "较差"),
    ("较好的", "较差的"), ("优", "劣"), ("优质", "劣质"), ("正", "负"), ("正面", "负面"), ("正例", "负例"),
    ("正样本", "负样本"), ("胜", "负"), ("胜出", "落败"), ("赢", "输"), ("偏好", "拒绝"), ("偏好", "非偏好"),
)  # fmt: skip
_SIDE_NOUNS = _names(
    """answer answers response responses resp output outputs completion completions reply text message messages turn
    turns conversation conversations dialogue sample solution summary candidate generation content example ans gpt
    assistant choice y 回答 回复 答案 回应 输出 答复 内容 文本"""
)
_BARE = _names("w l won lost high_quality low_quality strong weak desired undesired 正 负 胜 优 劣 好 坏 差 赢 输")


def _side_table() -> dict[tuple[str, str], None]:
    table: dict[tuple[str, str], None] = {}
    for good, bad in _SIDES:
        if good not in _BARE:
            table[good, bad] = None
        for noun in sorted(noun for noun in _SIDE_NOUNS if noun.isascii() == good.isascii()):
            for form in ("{0}_{1}", "{1}_{0}", "{0}{1}"):
                table[form.format(good, noun), form.format(bad, noun)] = None
    return table


# (better, worse), most usual first
SIDES = tuple(_side_table())
_WORSE_OF: dict[str, list[str]] = {}
for _good, _bad in SIDES:
    _WORSE_OF.setdefault(_good, []).append(_bad)


def sides_in(keys: dict[str, str]) -> list[tuple[str, str]]:
    """The (better, worse) columns among `keys` (canonical name to name), as the rows call them."""
    return [(keys[good], keys[bad]) for good in keys for bad in _WORSE_OF.get(good, ()) if bad in keys]


def canonical(columns: tuple[str, ...]) -> dict[str, str]:
    """Canonical name to the name in the row; of two that come out alike the first."""
    named: dict[str, str] = {}
    for column in columns:
        named.setdefault(key_of(column), column)
    return named


# ------------------------------------------------------------------------------------------- scores, ranks, choices

_UP = _names(
    """score scores rating ratings reward rewards quality grade grades points votes upvotes likes helpfulness
    preference_score 评分 得分 分数 打分"""
)
_DOWN = _names("rank ranks ranking rankings place places 排名 名次 排序")
_BEST = _names(
    """best best_index best_idx best_id best_response best_answer best_output best_completion choice chosen_index
    chosen_idx chosen_id preferred_index winner winner_index preferred 最佳 最优"""
)


def direction_of(name: str) -> str | None:
    """'up' (more is better), 'down' (1 is the best), 'best' (names one), 'sort' (PaddleNLP's); None where unclear."""
    key = key_of(name)
    if key in _BEST or key == "sort":
        return "best" if key in _BEST else "sort"
    last = key.rsplit("_", 1)[-1]
    if key in _UP or last in _UP:
        return "up"
    return "down" if key in _DOWN or last in _DOWN else None


# ------------------------------------------------------------------------------------------------------- metadata

_META = _names(
    """id ids uid uuid guid idx index indices hash sha sha1 sha256 md5 key source sources dataset datasets origin model
    models url uri link license licence author annotator annotators labeler worker workers batch split fold date time
    timestamp created updated version schemaversion domain category categories topic topics tag tags type types lang
    language languages locale score scores rating ratings reward rewards rank ranks ranking margin confidence agreement
    probability prob logprob logprobs logps perplexity token tokens length len count counts num number ratio temperature
    seed status meta metadata info policy rationale rationales explanation explanations justification critique critiques
    feedback comment comments annotation annotations judge judgment judgement evaluation evaluations principle
    principles criteria subreddit flag flags difficulty subject correctness safe safety harm harmful severity toxic
    toxicity embedding embeddings path filename cost latency usage level strength difference preference preferences
    keyword keywords doi pmid quotes reference_answer reference_response reference_output ground_truth gold_answer gold
    suggestion suggestions 编号 序号 来源
    类别 类型 标签 语言 模型 日期 时间 备注 理由"""
)


@lru_cache(maxsize=4096)
def is_metadata(name: str) -> bool:
    """Whether a column's name says that it is about the row rather than part of what is asked or answered."""
    key = key_of(name)
    return key in _META or any(token in _META for token in key.split("_"))
