"""How long a newcomer waits for the first report: ``python benchmarks/first_report.py``.

In an environment of its own: PyTorch, the wheel built here with its extras, and then one small script for each way of
docs/adapters.md, with the lines that are shown there and nothing else of ours.  Shown are the seconds of each step, on
the clock and on the processor; the network, and whatever else runs on the machine, is in the first.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]

DATA = """
import torch
from torch import nn
torch.manual_seed(0)
x = torch.randn(6400, 8)
y = torch.sin(x.sum(1, keepdim=True))
"""
NET = """
model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
"""
TRANSFORMERS = """
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from hybrid_predict_trainer.adapters.hf import HybridCallback
torch.manual_seed(0)
class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.randint(0, 100, (8000, 16))
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return {"input_ids": self.x[i], "labels": (self.x[i, 0] > self.x[i, 1]).long()}
model = BertForSequenceClassification(BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=128, max_position_embeddings=16))
args = TrainingArguments("out", max_steps=300, per_device_train_batch_size=16, learning_rate=1e-3, report_to=[],
    use_cpu=True)
trainer = Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[HybridCallback()])
trainer.train()
"""
LIGHTNING = (
    DATA
    + """
from lightning import LightningModule, Trainer
from hybrid_predict_trainer.adapters.lightning import HybridCallback
class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
Trainer(max_steps=400, accelerator="cpu", callbacks=[HybridCallback()]).fit(Net(), loader)
"""
)
ACCELERATE = (
    DATA
    + """
from accelerate import Accelerator
from hybrid_predict_trainer.adapters.accelerate import ride_along
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    def forward(self, x, y):
        return {"loss": nn.functional.mse_loss(self.net(x), y)}
accelerator = Accelerator(cpu=True)
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
loader = torch.utils.data.DataLoader([{"x": a, "y": b} for a, b in zip(x, y)], batch_size=16, shuffle=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
engine = ride_along(accelerator, model, optimizer, scheduler)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
print(engine.report_text())
"""
)
ATTACH = (
    DATA
    + NET
    + """
from hybrid_predict_trainer import attach
def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])
engine = attach(model, optimizer, loss_fn=loss_fn, lr_scheduler=scheduler)
for batch in loader:
    optimizer.zero_grad()
    loss = loss_fn(model, batch)
    loss.backward()
    engine.note(loss, batch)
    optimizer.step()
print(engine.report_text())
engine.detach()
"""
)
SCRIPTS = {
    "transformers.Trainer, 300 steps": TRANSFORMERS, "accelerate, 400 steps": ACCELERATE, "attach, 400 steps": ATTACH,
    "Lightning, 400 steps": LIGHTNING,
}  # fmt: skip


def timed(*command: str, cwd: Path) -> tuple[float, float, str]:
    """Seconds on the clock and on the processor, and the output of a command that has to succeed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement (default torch==2.13.0)")
    chosen = parser.parse_args(arguments)
    print("| step | seconds | of the processor |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = str(folder / "env" / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet"]

        def row(step: str, *command: str) -> str:
            wall, processor, said = timed(*command, cwd=folder)
            print(f"| {step} | {wall:.0f} | {processor:.1f} |", flush=True)
            return said

        row("`python3 -m venv`", sys.executable, "-m", "venv", "env")
        row(f"`pip install {chosen.torch}`", *pip, chosen.torch)
        row("the wheel", python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "wheel", str(ROOT))
        (wheel,) = folder.glob("wheel/*.whl")
        row("`pip install` of it with `[transformers]`", *pip, f"{wheel}[transformers]")
        for step, script in SCRIPTS.items():
            if step.startswith("Lightning"):
                row("`pip install` of it with `[lightning]`", *pip, f"{wheel}[lightning]")
            (folder / "script.py").write_text(script, encoding="utf-8")
            said = row(f"{step}, to its report", python, "script.py")
            if "hybrid-predict-trainer:" not in said:
                raise SystemExit(f"{step}: no report\n{said}")


if __name__ == "__main__":
    main()
