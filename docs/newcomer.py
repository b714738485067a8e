"""Walk the newcomer's path in a bare environment, and write it into docs/start.md as commands and times: python docs/newcomer.py

Builds the wheel, makes an environment and a project in a temporary folder, and runs every step as a newcomer would type it. The
packages that headgram needs are those of the environment that runs this, so that nothing is downloaded: `pip install` is timed
without them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "start.md"
BEGIN, END = "<!-- recorded by docs/newcomer.py -->\n", "<!-- end -->\n"
_PLOT = "import headgram; headgram.plot.heads(headgram.open_atlas('results'), 'smollm2-135m-instruct').save('first.png')"
#: A model of one's own: a llama of two layers, written as any other program would.
_OWN = """\
import json, torch
from pathlib import Path
from safetensors.torch import save_file
folder = Path("own-model")
folder.mkdir()
config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
(folder / "config.json").write_text(json.dumps(config | {"head_dim": 16}))
shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
weights = {f"model.layers.{n}.self_attn.{name}.weight": torch.randn(shape) for n in (0, 1) for name, shape in shapes.items()}
save_file(weights, folder / "model.safetensors")
"""
#: What is done, as a newcomer would say it, and the command.
STEPS = (
    ("install", "pip install headgram-*.whl"),
    ("look at the machine", "headgram doctor"),
    ("begin a study", "headgram init my-study && cd my-study"),
    ("see what would run", "headgram run -n"),
    ("measure two models", "headgram run"),
    ("first numbers", "headgram show smollm2-135m-instruct"),
    ("first picture of one's own", f'python -c "{_PLOT}"'),
    ("look into a model of one's own", "headgram inspect own-model"),
    ("add it, and a control", "printf 'own\\town-model\\n' >> config/models.tsv && headgram null own"),
    ("measure what is new", "headgram run"),
    ("compare with chance", "headgram show --where twin=1"),
)


def walk() -> list[tuple[str, str, float, float]]:
    """Every step with its command, the seconds that it took, and the load of the machine then.

    Raises
    ------
    subprocess.CalledProcessError
        If a step fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT], check=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
        (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        clean |= {"PATH": f"{folder / 'venv' / 'bin'}:{clean['PATH']}", "HF_HUB_OFFLINE": "1"}
        steps, where = [], folder
        for what, command in STEPS:
            if what == "install":
                wheel = next(folder.glob("*.whl"))
                arguments = [*pip, "--python", str(folder / "venv" / "bin" / "python"), "install", "--no-deps", str(wheel)]
            else:
                arguments = ["bash", "-c", command]
            started = time.perf_counter()
            done = subprocess.run(arguments, cwd=where, env=clean, capture_output=True, text=True)
            steps.append((what, command, time.perf_counter() - started, os.getloadavg()[0]))
            print(f"{steps[-1][2]:6.1f} s  {command}", flush=True)
            if done.returncode:
                raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
            if "cd my-study" in command:
                where = folder / "my-study"
                subprocess.run([folder / "venv" / "bin" / "python", "-c", _OWN], cwd=where, env=clean, check=True)
        assert (where / "first.png").stat().st_size > 10_000
        assert (where / "results" / "report" / "index.html").is_file()
        assert {"own", "own-null"} < json.loads((where / "config" / "models.lock.json").read_text())["models"].keys()
        return steps


def table(steps: list[tuple[str, str, float, float]]) -> str:
    """The steps in Markdown."""
    load = f"{os.cpu_count()} cores, with a load of {max(each[3] for each in steps):.0f} at most from this and other work."
    rows = [f"| {what} | `{command}` | {seconds:.0f} s |" for what, command, seconds, _ in steps]
    last = f"| **all** | | **{sum(each[2] for each in steps):.0f} s** |"
    return "\n".join([load, "", "| | command | took |", "|---|---|---|", *rows, last])


if __name__ == "__main__":
    text = PAGE.read_text()
    recorded = f"{BEGIN}\n{table(walk())}\n\n{END}"
    PAGE.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: recorded, text, flags=re.DOTALL))
