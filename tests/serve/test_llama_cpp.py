"""What llama.cpp and transformers make of an exported file: the tokens, prompts and probabilities of training."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from exported import export
from test_gguf import TEXTS, gguf_of, sentencepiece_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from conversation import get_conv_template
from preference.serve import merging
from preference.serve.loading import find_source, load_template, load_tokenizer
from preference.serve.merging import probes
from preference.serve.ollama import prompts_of, writes_bos
from tiny import tiny_model

needs_llama = pytest.mark.skipif(not find_spec("xllamacpp"), reason="no llama.cpp: pip install -r requirements-dev.txt")
SERVER = """
import os, sys, xllamacpp
server = None
for line in sys.stdin:
    server = None  # one at a time
    params = xllamacpp.CommonParams()
    model, _, adapter = line.strip().partition("+")
    params.model.path, params.n_ctx, params.n_parallel, params.port = model, 1024, 1, 0
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)
        params.lora_adapters = [lora]
    params.cpuparams.n_threads, params.use_jinja, params.warmup, params.verbosity = 1, True, False, -1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
os._exit(0)
"""
ALPHABETS = ((32, 127), (0xC0, 0x180), (0x410, 0x450), (0x4E00, 0x4E80), (0x3040, 0x3090), (0x1F600, 0x1F640))


class Llama:
    """llama.cpp's server in a process of its own: `llama(file)` serves a GGUF file in place of the one before, and
    gives `call(path, key=value, ...)`."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SERVER]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)

    def __call__(self, file: Path, adapter: Path | None = None) -> Callable[..., Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{file}{f'+{adapter}' if adapter else ''}\n")
        self.process.stdin.flush()
        address = next((line.strip() for line in self.process.stdout if line.startswith("http")), None)
        assert address, f"llama.cpp did not load {file}"

        def call(path: str, **values: Any) -> Any:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/{path}", json.dumps(values).encode(), headers)
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)

        return call


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    llama = Llama()
    yield llama
    llama.process.kill()
    llama.process.wait()


def rows(root: Path) -> list[dict[str, Any]]:
    lines = (root / "data" / "eval").glob("*.jsonl")
    return [json.loads(line) for path in sorted(lines) for line in path.read_text(encoding="utf-8").splitlines()]


def conversations(root: Path) -> Iterator[list[dict[str, str]]]:
    """Of the sample data, up to a question; its answers as questions; random characters of several scripts."""
    draw = random.Random(0)
    characters = [chr(code) for ends in ALPHABETS for code in range(*ends)] + ["\n", "\n\n", "  ", "\t", " 2026", "'ll"]
    mixed = ["".join(draw.choices(characters, k=draw.randint(1, 30))) for _ in range(100)]
    for row in [*rows(root), *({"question": text} for text in mixed)]:
        found = [("system", row["system"])] if row.get("system") else []
        for user, assistant in row.get("history") or ():
            found += [("user", user), ("assistant", assistant)]
        for text in {row["question"], row.get("response_chosen", row["question"])}:
            yield [{"role": role, "content": content} for role, content in [*found, ("user", text)]]


def check_prompts(call: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, root: Path) -> None:
    """Written by llama.cpp from the model's chat template and cut by it."""
    for messages in conversations(root):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = call("apply-template", messages=messages)["prompt"]
        assert prompt == expected or tokenizer.bos_token + prompt == expected  # BOS is left to what comes next
        ids = tokenizer.encode(expected, add_special_tokens=False)
        assert call("tokenize", content=prompt, add_special=True, parse_special=True)["tokens"] == ids, prompt


@pytest.fixture(scope="module")
def exported(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, str]]:
    """exported(quantization, dtype): the folder of the starter model's export, made once, and what was said."""

    @functools.cache
    def make(quantization: str, dtype: str) -> tuple[Path, str]:
        out = tmp_path_factory.mktemp(quantization) / "smol"
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
            export(patch, starter_model, "--output", out, "--gguf", quantization, "--dtype", dtype)
        return out, said.getvalue()

    return make


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize("quantization, dtype, bound", [("f16", "float32", 0.05), ("q8_0", "bfloat16", 0.5)])
def test_the_starter_model_answers_there_as_here(
    root: Path,
    exported: Callable[[str, str], tuple[Path, str]],
    quantization: str,
    dtype: str,
    bound: float,
    llama: Llama,
) -> None:
    """Each token that llama.cpp writes has here the log-probability that it has there, and next to none is likelier."""
    out, _ = exported(quantization, dtype)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    questions = ["Name two summer drinks.", "What is a noun?", "How do I boil an egg?"]
    call = llama(out / f"smol-{quantization}.gguf")
    check_prompts(call, tokenizer, root)
    for question in questions:
        prompt = call("apply-template", messages=[{"role": "user", "content": question}])["prompt"]
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer = call("completion", prompt=ids, n_predict=24, temperature=0, n_probs=1, cache_prompt=False)
        written = [(token["id"], token["logprob"]) for token in answer["completion_probabilities"]]
        assert len(written) > 5
        full = torch.tensor([ids + [token for token, _ in written]])
        with torch.no_grad():
            logps = model(full).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        for row, (token, there) in zip(logps, written, strict=True):
            assert abs(row[token].item() - there) < bound and row.max() - row[token] < bound


@pytest.mark.slow
def test_the_starter_model_is_exported_to_gguf(
    starter_model: Path, exported: Callable[[str, str], tuple[Path, str]]
) -> None:
    """And read back by transformers; here, as the export is made once for this and for llama.cpp."""
    out, said = exported("q8_0", "bfloat16")
    assert "smol-q8_0.gguf: read back" in said and "Prompts as in training (template smollm2)" in said
    assert (out / "Modelfile").read_text().endswith('PARAMETER stop "<|im_end|>"\n')
    source = find_source(str(starter_model))
    tokenizer = load_tokenizer(source)
    questions = probes(load_template(source, tokenizer)[0], tokenizer)
    exact = AutoModelForCausalLM.from_pretrained(starter_model, dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(out, gguf_file="smol-q8_0.gguf", dtype=torch.float32)
    read_back, expected = merging.logits_of(found, questions), merging.logits_of(exact, questions)
    assert merging.difference(expected, read_back).kl < 5e-3
    with torch.no_grad():  # the rest is the format's own rounding, and nothing else
        for weight in exact.parameters():
            if weight.ndim == 2:
                q8 = gguf.GGMLQuantizationType.Q8_0
                weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), q8), q8)))
    assert (merging.logits_of(exact, questions) - read_back).abs().max() < 1e-3
    read = AutoTokenizer.from_pretrained(out, gguf_file="smol-q8_0.gguf")
    for text in [*TEXTS, tokenizer.decode(questions[0][0])]:
        assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, arch, template",
    [
        ("qwen2", "qwen2", "qwen2_5"),
        ("llama3", "llama", "llama3"),
        ("llama2", "llama", "llama2"),
        ("phi3", "llama", "phi3"),
    ],
)
def test_real_tokenizers_cut_there_as_here(
    shared: Path, root: Path, tmp_path: Path, name: str, arch: str, template: str, llama: Llama
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    conv = get_conv_template(template)
    tokenizer.chat_template = conv.jinja()
    options = dict(stop_ids=[tokenizer.convert_tokens_to_ids(conv.stop_str)], writes_bos=writes_bos(conv, tokenizer))
    model = tiny_model(arch, vocab_size=len(tokenizer))
    check_prompts(llama(gguf_of(model, tmp_path, tokenizer, prompts=prompts_of(conv), **options)), tokenizer, root)


@needs_llama
def test_a_sentencepiece_tokenizer_cuts_there_as_here(root: Path, tmp_path: Path, llama: Llama) -> None:
    """One that puts a space before the very first word alone: its prompts begin with a control token."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = get_conv_template("llama2").jinja()
    prompts = prompts_of(get_conv_template("llama2"))
    call = llama(gguf_of(tiny_model(), tmp_path, tokenizer, writes_bos=True, prompts=prompts))
    for prompt in prompts:
        expected = tokenizer.encode(prompt, add_special_tokens=False)
        assert call("tokenize", content=prompt, add_special=False, parse_special=True)["tokens"] == expected
