"""torchrun's processes end where one process ends, stop together, and leave one set of files."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from components.common.artifacts import write_json
from components.common.dataset import Dataset
from components.common.scoring import score
from components.training.config import TrainConfig
from components.training.parallel import Ranks
from models.checkpoint import CHECKPOINT_FILES, load

ROOT = Path(__file__).resolve().parents[3]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class World:
    """A work folder with a dataset, and `python -m components train MODEL` in it, in one process or several."""

    root: Path
    dataset: Path

    def config(self, model: str, network: dict[str, Any], **changes: Any) -> TrainConfig:
        values = {
            "seed": 1, "batch_size": 128, "max_epochs": 2, "patience": 4, "lr": 0.01, "lr_factor": 0.5,
            "lr_patience": 0, "min_lr": 1e-6, "embedding_l2": 1e-6, "network_l2": 0.0, "ema": 0.0,
            "clip_norm": 1.0, "device": "cpu", "precision": "fp32", "compile": False, "network": network,
        }  # fmt: skip
        config = TrainConfig(**(values | changes))
        (self.root / "params.yaml").write_text(yaml.safe_dump({"train": {model: asdict(config)}}))
        return config

    def command(self, model: str, name: str, processes: int) -> list[str]:
        out = self.root / name
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return [
            sys.executable, *(launcher if processes > 1 else []), "-m", "components", "train", model,
            "--dataset", str(self.dataset), "--weights", str(self.root / "start"), "--output", str(out / model),
            "--metrics", str(out / "metrics.json"), "--history", str(out / "history.csv"),
        ]  # fmt: skip

    def env(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def train(self, model: str, name: str, processes: int = 1) -> str:
        done = subprocess.run(
            self.command(model, name, processes),
            cwd=self.root, env=self.env(), capture_output=True, text=True, check=False, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def history(self, name: str) -> list[dict[str, float]]:
        with (self.root / name / "history.csv").open() as opened:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(opened)]

    def scores(self, model: str, name: str) -> torch.Tensor:
        data = Dataset.open(self.dataset)
        return score(load(self.root / name / model).model, data, data.splits["test"])[0].sigmoid()


@pytest.fixture
def world(tmp_path, raw_rows, write_dataset) -> World:
    write_json(tmp_path / "start/start.json", {"champion": None})
    return World(tmp_path, write_dataset(tmp_path / "dataset", raw_rows()))


@pytest.mark.parametrize(
    ("model", "processes", "batch_size"),
    [
        ("qin", 2, 519),  # 1560 rows: 3 × 519 + 3, and ranks of 259 and 260, of 1 and 2 rows
        ("sdcnv3", 3, 779),  # 2 × 779 + 2: in the last step one of the three has no row
    ],
)
def test_several_processes_learn_what_one_does(world, networks, model, processes, batch_size) -> None:
    """Every figure of every epoch, the gradient clipped in most steps, BatchNorm's statistics, and every score."""
    world.config(model, networks[model], batch_size=batch_size, max_epochs=3)
    world.train(model, "one")
    said = world.train(model, "many", processes)
    for one, many in zip(world.history("one"), world.history("many"), strict=True):
        assert many == pytest.approx(one, rel=1e-4)
    one, many = (load(world.root / name / model).model.state_dict() for name in ("one", "many"))
    statistics = [name for name in one if "running" in name or "tracked" in name]
    assert statistics
    for name in statistics:
        torch.testing.assert_close(many[name], one[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(world.scores(model, "many"), world.scores(model, "one"), rtol=0, atol=1e-3)
    assert json.loads((world.root / f".scratch/stages/train@{model}.json").read_text())["processes"] == processes
    # one speaks
    assert said.count(f"{model} epoch 1:") == 1
    assert len(re.findall(rf"train@{model}: [\d.]+ s", said)) == 1
    assert len(re.findall(r"^speed +[\d,]+ rows/s on cpu", said, re.MULTILINE)) == 1


def test_processes_stop_together_and_go_on_to_the_same_bytes(world, networks) -> None:
    world.config("qin", networks["qin"], batch_size=32, max_epochs=3)
    with subprocess.Popen(
        world.command("qin", "cut", 2), cwd=world.root, env=world.env(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("qin epoch 1:"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode != 0
    (step,) = re.findall(r"qin: stopped by SIGTERM in epoch 2 after step (\d+)\. Run the same command", said)
    assert not (world.root / "cut").exists()
    assert f"qin: continues after epoch 1, step {step}\n" in world.train("qin", "cut", 2)
    world.train("qin", "whole", 2)
    for file in CHECKPOINT_FILES:
        assert (world.root / "cut/qin" / file).read_bytes() == (world.root / "whole/qin" / file).read_bytes()


SPOILT = """
import sys
from components import __main__ as program
from components.training.step import Step
take = Step.take
def spoilt(step, *arguments):
    return take(step, *arguments) * (float("nan") if step.state.progress.epoch else 1.0)
Step.take = spoilt
sys.exit(program.main(sys.argv[1:]))
"""


def test_processes_that_diverge_leave_the_best_epoch(world, networks) -> None:
    world.config("qin", networks["qin"])
    (world.root / "spoilt.py").write_text(SPOILT)
    command = world.command("qin", "out", 2)
    at = command.index("components")
    command[at - 1 : at + 1] = ["spoilt.py"]
    done = subprocess.run(command, cwd=world.root, env=world.env(), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "the loss is nan in epoch 2, step 1" in done.stderr
    assert load(world.root / ".scratch/train/qin/best").facts["best_epoch"] == 1
    assert not (world.root / "out").exists()


def test_what_torchrun_cannot_run_is_told(world, networks) -> None:
    world.config("qin", networks["qin"], compile=True)
    done = subprocess.run(
        world.command("qin", "out", 2), cwd=world.root, env=world.env(), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "train.qin.device is 'cpu' and compile is True; under torchrun" in " ".join(done.stderr.split())
    assert not (world.root / "out").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [2, 3, 128, 131])
def test_shares_are_even_and_leave_no_row(size, rows) -> None:
    shares = [torch.arange(rows)[Ranks(rank, size).share(rows)] for rank in range(size)]
    assert torch.equal(torch.cat(shares), torch.arange(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
