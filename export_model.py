#!/usr/bin/env python3
"""Turn what a run has left into a model that other programs load: merged, in one type, with template and stop tokens.

    python export_model.py outputs/run --output exported                    safetensors, for transformers and vLLM
    python export_model.py outputs/run --output exported --gguf q8_0        also GGUF and an Ollama Modelfile
    python export_model.py outputs/run --output exported --compressed fp8   8 bits a weight, for vLLM and SGLang
    python export_model.py outputs/run --output exported --push_to_hub me/my-model

Works on the CPU and needs memory for the weights in float32, twice that to compare in float64 where there is as much.
docs/serving.md says how the result is served.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preference.errors import PreferenceError
from preference.launch.process import stay_private
from preference.launch.tool import modelscope_asked, run_tool
from preference.screen import shown

if TYPE_CHECKING:
    from preference.serve.loading import Source
    from preference.serve.merging import Difference, Probes

SUPPORTED_GGUF = ("q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16")
COMPRESSED = ("fp8", "w4a16")
MUCH = 0.1  # nats a token


class ExportError(PreferenceError, RuntimeError):
    """An export that would destroy something or cannot be done; str() says the way out."""


def main() -> None:
    args = parse_arguments()
    stay_private()

    def work() -> None:
        export(args)
        if args.push_to_hub:
            push(Path(args.output), args.push_to_hub, args.hub)

    run_tool(work, "export_model.py")


def say(text: str) -> None:
    print(shown(text), flush=True)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="a run's output folder, one of its checkpoints, a model folder or a hub id")
    add("--output", required=True, metavar="DIR", help="folder to make")
    add("--overwrite", action="store_true", help="replace the model that lies in --output")
    add("--base_model", help="the model that the adapter belongs to, where it is not where the run found it")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="auto = as the base has it")
    add("--max_shard_size", default="5GB", help="largest safetensors file")
    add("--gguf", choices=SUPPORTED_GGUF, help="also write GGUF: 4.5 bits a weight (q4_0) to 16 (f16)")
    add("--compressed", choices=COMPRESSED, help="linear weights in 8 or 4 bits (compressed-tensors), for vLLM, SGLang")
    add("--gguf_adapter", action="store_true", help="also write the LoRA adapter as GGUF, for llama-server --lora")
    add("--push_to_hub", metavar="OWNER/NAME", help="upload the folder, as a private repository")
    add("--hub", choices=["huggingface", "modelscope"], default="huggingface", help="where --push_to_hub goes")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the base model")
    args = parser.parse_args(words)
    if args.push_to_hub and args.push_to_hub.count("/") != 1:
        parser.error("--push_to_hub takes owner/name")
    if args.compressed and args.dtype == "float32":
        parser.error("--compressed stores what is left in 16 bits: drop --dtype float32, or take bfloat16 or float16")
    return args


def export(args: argparse.Namespace) -> None:
    """Make the folder: built beside its place and moved there whole, so that a failed export leaves nothing behind."""
    from transformers.utils import logging

    from preference.serve.card import check_described
    from preference.serve.loading import find_source, load_template, load_tokenizer, resolve_base
    from preference.serve.placing import move_into_place, workspace

    logging.disable_progress_bar()
    modelscope = modelscope_asked()
    source = find_source(
        args.model, base=args.base_model, use_modelscope=modelscope, trust_remote_code=args.trust_remote_code
    )
    base = resolve_base(source, modelscope) if source.adapter else source.name
    output = Path(args.output)
    check_output(output, args.overwrite, [source.name, base])
    config = load_config(base, args)
    tokenizer = load_tokenizer(source)
    template, warnings = load_template(source, tokenizer)
    for warning in warnings:
        say(f"warning: {warning}")

    check_described(source)
    folder = workspace(output)
    try:
        write(args, source, config, tokenizer, template, folder, modelscope)
        for origin in (base, source.base):
            copy_licence(origin, folder)
        folder.chmod(0o777 & ~_umask())
        move_into_place(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.iterdir())
    say(f"exported to {output} ({size / 1e6:,.0f} MB): {', '.join(sorted(file.name for file in output.iterdir()))}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output(output: Path, overwrite: bool, sources: list[str]) -> None:
    """Refuse to write over anything but a model that may go, and over what is read."""
    for source in sources:
        if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
            raise ExportError(f"--output {output} would replace {source}, which is read")
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"--output {output} is not a folder")
    if any(output.iterdir()):
        if not overwrite:
            raise ExportError(f"--output {output} is not empty: choose another folder, or add --overwrite")
        if not (output / "config.json").is_file():
            raise ExportError(
                f"--output {output} holds no model, so --overwrite leaves it alone: choose another folder"
            )


def load_config(base: str, args: argparse.Namespace) -> Any:
    """The base model's config. Raises GGUFError before anything is loaded if its architecture cannot be written."""
    from preference.models.folder import read_config

    config = read_config(base, trust_remote_code=args.trust_remote_code)
    if args.gguf:
        from preference.serve.gguf_architectures import check_supported
        from preference.serve.gguf_types import check_quantizer

        check_supported(config)
        check_quantizer(args.gguf)
    if args.compressed:
        from preference.serve.compressed import check_package

        check_package()
    return config


def write(
    args: argparse.Namespace, source: Source, config: Any, tokenizer: Any, template: Any, folder: Path, modelscope: bool
) -> None:
    """Merge, measure, and write every file of the export into `folder`."""
    import torch

    from preference.models.limits import check_vocabulary
    from preference.serve.card import Copy, export_card
    from preference.serve.launcher import serve_script
    from preference.serve.loading import generation_config
    from preference.serve.merging import cast, load_merged, name_of, probes
    from preference.templates.resolve import chat_template_to_save, stop_ids

    questions = probes(template, tokenizer)
    if args.gguf_adapter:
        write_adapter(args, source, config, folder)
    say(f"loading {source.name}" + (f" and its base {source.base}" if source.adapter else "") + " ...")
    model, exact, merged = load_merged(source, questions, modelscope)
    if merged:
        say(f"merged, compared in {merged.computed_in}: {merged}")
    generation = generation_config(source, model)
    stops = stop_ids(generation, template, tokenizer)
    check_vocabulary(model, tokenizer, stops)
    generation.eos_token_id = stops
    tokenizer.chat_template = chat_template_to_save(template, tokenizer)

    files = []
    if args.gguf:  # from the float32 weights, before they are rounded
        files.append(write_gguf_files(args, model, tokenizer, template, stops, folder))
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else config.dtype or torch.float32
    if args.compressed and dtype == torch.float32:
        dtype = torch.bfloat16
    name, change = name_of(dtype), cast(model, dtype, questions, exact)
    if change:
        say(f"rounded to {name}: {change[0]}\nfor comparison, computing in {name}: {change[1]}")
    model.generation_config = generation
    if not generation.do_sample and any(
        getattr(generation, name) is not None for name in ("temperature", "top_p", "top_k")
    ):
        generation.do_sample = True  # sampling values mean that sampling is meant; transformers refuses to save else
    compressed = save_weights(args, model, folder, questions)
    tokenizer.save_pretrained(folder)
    script = serve_script(Path(args.output).resolve().name, files[0] if files else None, stops)
    (folder / "serve.sh").write_text(script, encoding="utf-8")
    copy = Copy(name, merged, change and change[0], compressed, files)
    card = export_card(source, copy, args.output)
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # names of any bytes


def save_weights(
    args: argparse.Namespace, model: Any, folder: Path, questions: Probes
) -> tuple[str, Difference] | None:
    """The safetensors files with config.json; for --compressed, what its layers are and what that changes."""
    from safetensors import SafetensorError

    try:
        if not args.compressed:
            model.save_pretrained(folder, max_shard_size=args.max_shard_size)
            return None
        from preference.serve.compressed import save_compressed

        words, change = save_compressed(model, args.compressed, folder, questions, args.max_shard_size)
    except SafetensorError as error:  # how its library says that the disk is full
        free = shutil.disk_usage(folder).free / 1e9
        raise ExportError(
            f"the model could not be written ({error}; {free:.1f} GB are free): set --output to another disk"
        ) from error
    say(f"compressed to {args.compressed} ({words}): {change}")
    if change.kl > MUCH:
        say(f"note: more than {MUCH} nats a token changes answers; compare them with chat.py, or take more bits")
    return words, change


def write_gguf_files(
    args: argparse.Namespace, model: Any, tokenizer: Any, template: Any, stops: list[int], folder: Path
) -> str:
    """The GGUF file and its Modelfile; returns the file's name."""
    from preference.serve.gguf import write_gguf
    from preference.serve.ollama import family_of, modelfile, prompts_of, writes_bos

    name = Path(args.output).resolve().name
    file = f"{name}-{args.gguf}.gguf"
    bos = writes_bos(template, tokenizer)
    prompts = prompts_of(template)
    share, note = write_gguf(
        folder / file,
        model,
        tokenizer,
        quantization=args.gguf,
        stop_ids=stops,
        writes_bos=bos,
        name=name,
        prompts=prompts,
    )
    say(f"{file}: read back, every tensor as written (largest error {share:.2f} of what {args.gguf} allows)")
    if note:
        say(f"note: {note}")
    conv = family_of(template, tokenizer)
    text = modelfile(file, conv, [tokenizer.decode([token]) for token in stops], tokenizer.bos_token if bos else "")
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    say("\n".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")))
    return file


def write_adapter(args: argparse.Namespace, source: Source, config: Any, folder: Path) -> None:
    from preference.serve.gguf_adapter import write_gguf_adapter

    if not source.adapter:
        raise ExportError(f"{source.name} is a whole model: --gguf_adapter is for adapters, --gguf writes it")
    file = f"{Path(args.output).resolve().name}-adapter.gguf"
    count = write_gguf_adapter(folder / file, source.name, config)
    say(f"{file}: the adapter of {count} matrices, over a GGUF file of {source.base}")


def copy_licence(origin: str | None, folder: Path) -> None:
    """A derived model carries the licence of its base, where that lies in the base's folder."""
    if origin is None:
        return
    for pattern in ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"):
        for file in Path(origin).glob(pattern):
            if file.is_file() and not file.is_symlink():  # a link could bring any file of this machine along
                shutil.copy(file, folder / file.name)


def push(folder: Path, name: str, hub: str) -> None:
    """Upload the folder to a private repository of the hub, made if it is not there."""
    if hub == "huggingface":
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

        api = HfApi()
        try:
            api.create_repo(name, private=True, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload tuned model")
        except (HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OSError) as error:
            raise ExportError(f"{name} could not be uploaded ({folder} is complete): {error}") from error
    else:
        try:
            from modelscope.hub.api import HubApi
        except ImportError:
            raise ExportError("--hub modelscope needs its package: pip install modelscope") from None
        api = HubApi()
        api.create_repo(name, repo_type="model", visibility="private", exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Upload tuned model")
    say(f"pushed to {name} on {hub}; a repository that is new is private")


if __name__ == "__main__":
    main()
