"""Files for clusters, containers and notebooks: their form, as far as it can be checked without one."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from preference.launch.process import LaunchError, refuse_lone_process

ROOT = Path(__file__).resolve().parents[2]


def test_slurm(tmp_path: Path) -> None:
    """A fake srun runs the step here, on a node that ends with 75: the job is put into the queue again."""
    script = ROOT / "torchrun" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    (tmp_path / "torchrun").mkdir()
    wrapper = tmp_path / "torchrun" / "run_multi_node.sh"
    wrapper.write_text('echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $*" > said; exit 75\n')
    programs = {"srun": 'SLURM_NODEID=1 exec "$@"', "scontrol": '[ $1 = show ] && printf "a\\nb\\n"; echo $* >> called'}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NNODES": "2", "SLURM_JOB_ID": "71234"}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash", script, "--save_steps", "9 9"], env=environment)
    assert done.returncode == 75
    assert (tmp_path / "said").read_text() == "2 1 a 21234 --save_steps 9 9\n"
    assert (tmp_path / "called").read_text().splitlines()[-1] == "requeue 71234"


def test_kubernetes() -> None:
    service, job = yaml.safe_load_all((ROOT / "torchrun" / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())  # a number is refused by the server
    assert environment["NNODES"] == str(spec["completions"])
    assert environment["NPROC"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    name = job["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    subprocess.run(["sh", "-n", "-c", container["command"][-1]], check=True)


def test_skypilot() -> None:
    task = yaml.safe_load((ROOT / "torchrun" / "sky.yaml").read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)
    launcher = (ROOT / "run_orpo.sh").read_text()
    assert all(re.search(rf"^{name}=", launcher, re.MULTILINE) for name in task["envs"])


def test_the_notebook() -> None:
    """nbformat 4.5: every cell has an id of its own, code cells have outputs and a count."""
    notebook = json.loads((ROOT / "recipes" / "free_t4.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len({*ids}) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("!"):
                    subprocess.run(["bash", "-n", "-c", line[1:]], check=True)
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert all((ROOT / name).is_file() for name in re.findall(r"\b(\w+\.(?:py|sh)|requirements\.txt)\b", text))


def test_the_workflow() -> None:
    """It runs the tests and builds the site, by commands that are there."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    for command in commands:
        subprocess.run(["sh", "-n", "-c", command], check=True)
        assert all((ROOT / name).is_file() for name in re.findall(r"[\w./-]+\.(?:sh|py|txt)\b", command)), command
    assert "sh run_tests.sh" in commands[0] and commands[-1] == "python docs/build_site.py"


def test_the_dockerfile() -> None:
    """What hadolint asks for: pinned base, exec form, no cache left, a user that is not root."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {name for name, _ in steps} <= {"FROM", "ARG", "ENV", "WORKDIR", "RUN", "COPY", "USER", "CMD"}
    words = dict(steps)
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", words["FROM"]) and not words["FROM"].endswith(":latest")
    assert json.loads(words["CMD"])[:2] == ["sh", "run_orpo.sh"] and words["USER"] not in ("root", "0")
    for name, rest in steps:
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
            assert "apt-get install" not in rest or ("--no-install-recommends" in rest and "/var/lib/apt/lists" in rest)
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    assert "--extra-index-url x -r" in subprocess.run(
        ["sh", "-c", "echo " + next(rest for name, rest in steps if "-r requirements.txt" in rest)],
        env={"TORCH_INDEX_URL": "x"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"models", "outputs", "collected", ".venv"} <= {*ignored}


def test_a_lone_process_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate launch --num_processes 2 starts without --multi_gpu, in the environment that it makes for it."""
    for name in ("MASTER_PORT", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    words = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu orpo_train.py"
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words.split()))
    lone = prepare_simple_launcher_cmd_env(args)[1]
    with pytest.raises(LaunchError, match="--multi_gpu"):
        refuse_lone_process(lone)
    refuse_lone_process(lone | {"WORLD_SIZE": "2"})
    refuse_lone_process({"ACCELERATE_MIXED_PRECISION": "no"})
    refuse_lone_process({"MASTER_PORT": "29500"})
