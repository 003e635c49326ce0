"""The model of `_model.py` in PyTorch, and the ways to train it there: Lightning's Trainer, and a loop without it."""

import itertools
from typing import Any

import numpy as np
import torch
from _model import Model
from torch import nn
from torch.nn import functional


class Layer(nn.Module):
    """Attention and MLP on a residual stream (N, T, width)."""

    def __init__(self, model: Model):
        super().__init__()
        self.heads, width = model.heads, model.width
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = map(split, self.qkv(self.norm_attention(x)).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))


class GPT(nn.Module):
    """`Model`, with its parameters' shapes and its start's distribution."""

    def __init__(self, model: Model):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(-(-model.vocabulary // 128) * 128, model.width))
        self.positions = nn.Parameter(torch.empty(model.length, model.width))
        self.layers = nn.ModuleList(Layer(model) for _ in range(model.layers))
        self.norm = nn.LayerNorm(model.width)
        for name, leaf in self.named_parameters():
            if leaf.ndim == 2:
                nn.init.normal_(leaf, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(leaf)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the next token; `tokens` is (N, T + 1), int64."""
        x = functional.embedding(tokens[:, :-1], self.embedding) + self.positions
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers:
            x = layer(x)
        logits = functional.linear(self.norm(x), self.embedding)
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def compiled(model: Model, mode: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """(the model under `torch.compile(mode=)`, its AdamW with optax's defaults), on the GPU if there is one."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    net = GPT(model).to(device())
    if mode == "reduce-overhead":
        # A gradient must not live in a CUDA graph's memory: there are buffers for it from the start.
        for leaf in net.parameters():
            leaf.grad = torch.zeros_like(leaf)
    net.compile(mode=mode)
    return net, torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=1e-4, fused=True)


def micro_batches(windows: np.ndarray) -> list[torch.Tensor]:
    """Those of all windows, (N, T + 1) int64 each, on the device: tensors of their own, which are aligned."""
    return [part.clone() for part in torch.from_numpy(windows).long().to(device()).flatten(0, 1)]


def device() -> str:
    """Where it trains."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def loop(model: Model, mode: str, windows: np.ndarray, gate: Any) -> None:
    """A loop by hand, a window whenever `gate` asks for one; `windows` is (windows, K, N, T + 1)."""
    net, opt = compiled(model, mode)
    k, parts = windows.shape[1], itertools.cycle(micro_batches(windows))
    total, size = torch.zeros((), device=device()), sum(leaf.numel() for leaf in net.parameters())
    while gate.asked():
        total.zero_()
        for part in itertools.islice(parts, k):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device(), torch.bfloat16):
                loss = net(part)
            (loss / k).backward()
            total += loss.detach()
        opt.step()
        opt.zero_grad(set_to_none=mode != "reduce-overhead")
        gate.answer(finished(total) / k, size)


def trainer(model: Model, mode: str, windows: np.ndarray, gate: Any) -> None:
    """The same by Lightning's Trainer, which waits for `gate` before a window's first micro-batch."""
    from lightning import LightningModule, Trainer

    k, parts = windows.shape[1], micro_batches(windows)

    class Parts(torch.utils.data.Dataset):
        def __len__(self):
            return 10**9  # More than anyone asks for.

        def __getitem__(self, index):
            return parts[index % len(parts)]

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.opt = compiled(model, mode)
            self.total = torch.zeros((), device=device())

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx % k:
                return None
            self.total.zero_()
            return None if gate.asked() else -1  # which ends the epoch

        def training_step(self, batch, batch_idx):
            torch.compiler.cudagraph_mark_step_begin()
            loss = self.net(batch)
            self.total += loss.detach()
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if (batch_idx + 1) % k == 0:
                size = sum(leaf.numel() for leaf in self.parameters())
                gate.answer(finished(self.total) / k, size)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=mode != "reduce-overhead")

        def configure_optimizers(self):
            return self.opt

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    accelerator = "gpu" if device() == "cuda" else "cpu"
    fit = Trainer(
        max_epochs=1, accelerator=accelerator, devices=1, precision="bf16-mixed", accumulate_grad_batches=k, **quiet
    )
    fit.fit(Module(), torch.utils.data.DataLoader(Parts(), batch_size=None))


def finished(total: torch.Tensor) -> float:
    """`total`, when the device is done with all that it was given."""
    if total.is_cuda:
        torch.cuda.synchronize()
    return float(total)
