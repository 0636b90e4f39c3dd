"""The generator and discriminator steps of the sprint in PyTorch, to compare their speed.

The networks are the modules of diffusers' transformers, called one by one so that features can be
taken and the trunk can stop. The heads use PyTorch's spectral norm. With the same weights and draws
the losses agree with ours to rounding (`tests/benchmarks/test_benchmark.py`). PyTorch uses its
fastest choice: the tangent by `torch.func.jvp` in a separate pass or in the differentiated one, and
explicit or fused attention where no tangent is taken. Both optimizers are fused AdamW.
"""

# The types of these libraries are incomplete.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as nn_f
from torch import nn
from torch.nn.utils import parametrizations

from benchmarks import peers
from benchmarks.harness import bench as bench_lib
from benchmarks.harness import machine, timing
from sprint_jax import build, config
from sprint_jax.conversion import tables
from sprint_jax.diffusion import trigflow
from sprint_jax.models.discriminator import GROUP, KERNEL

SIGMA_D = trigflow.SIGMA_D


@dataclasses.dataclass(frozen=True)
class Choice:
    """Options of the PyTorch implementation."""

    # Value, gradient and tangent from one pass; else the tangent from a pass without gradients.
    one_pass: bool
    fused_attention: bool  # where no tangent is taken

    def __str__(self) -> str:
        passes = "value and tangent in one pass" if self.one_pass else "tangent in a separate pass"
        return f"{passes}, {'fused' if self.fused_attention else 'explicit'} attention elsewhere"


CHOICES = tuple(Choice(*flags) for flags in itertools.product((False, True), (False, True)))


class CrossAttention:
    """diffusers' cross-attention. `fused` is off for tangents, for which the kernel has no rule."""

    fused = False

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention, by diffusers' names of arguments."""
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (a.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for a in (q, k, v))
        bias = None if attention_mask is None else attention_mask[:, None]
        if self.fused:
            out = nn_f.scaled_dot_product_attention(
                q, k, v, attn_mask=None if bias is None else bias.to(q.dtype)
            )
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            out = (scores if bias is None else scores + bias).softmax(-1) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Network(nn.Module):
    """diffusers' transformer with features of chosen blocks and the student's log-variance."""

    def __init__(self, sana: Any, logvar: nn.Module | None = None) -> None:
        super().__init__()
        self.sana, self.logvar, self.attention = sana, logvar, CrossAttention()
        for block in sana.transformer_blocks:
            block.attn2.set_processor(self.attention)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor,
        guidance: torch.Tensor | None = None,
        *,
        features: tuple[int, ...] = (),
        velocity: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor]]:
        """Return velocity or None, logvar or None, and features [B, N, D] of x [B, C, H, W]."""
        m = self.sana
        batch, channels, height, width = x.shape
        bias = ((1 - mask) * -10000.0)[:, None].to(x.dtype)
        h = m.patch_embed(x)
        if guidance is None:
            options = {"batch_size": batch}
        else:
            options = {"guidance": guidance * m.config.guidance_embeds_scale}
        modulation, conditioning = m.time_embed(t, hidden_dtype=h.dtype, **options)
        text = m.caption_norm(m.caption_projection(text).view(batch, -1, h.shape[-1]))
        collected, last = [], len(m.transformer_blocks) if velocity else max(features) + 1
        for i, block in enumerate(m.transformer_blocks[:last]):
            h = block(h, None, text, bias, modulation, height, width)
            if i in features:
                collected.append(h)
        logvar = None if self.logvar is None else self.logvar(conditioning.float())[:, 0]
        if not velocity:
            return None, logvar, collected
        h = m.proj_out(m.norm_out(h, conditioning, m.scale_shift_table))
        return h.transpose(1, 2).reshape(batch, channels, height, width), logvar, collected


class Head(nn.Module):
    """One LADD head, [B, N, D] -> [B, N]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(width, width, 1)
        self.conv_mid = nn.Conv1d(
            width, width, KERNEL, padding=KERNEL // 2, padding_mode="circular"
        )
        self.conv_out = nn.Conv1d(width, 1, 1)
        for name in ("norm_in", "norm_mid"):
            self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(width, 1)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(width, 1)))

    def normed(self) -> "Head":
        """Add spectral norm to the convolutions."""
        for name in ("conv_in", "conv_mid", "conv_out"):
            parametrizations.spectral_norm(getattr(self, name))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of features."""
        x = x.float().transpose(1, 2)
        x = nn_f.leaky_relu(
            batch_norm_local(self.conv_in(x), self.norm_in_scale, self.norm_in_bias), 0.2
        )
        y = batch_norm_local(self.conv_mid(x), self.norm_mid_scale, self.norm_mid_bias)
        return self.conv_out((x + nn_f.leaky_relu(y, 0.2)) / math.sqrt(2))[:, 0]


def batch_norm_local(x: torch.Tensor, scale: Any, bias: Any) -> torch.Tensor:
    """Normalize x [B, D, N] over groups of GROUP samples and all tokens.

    It uses PyTorch's batch norm, with groups as channels.
    """
    batch, width, tokens = x.shape
    groups = math.ceil(batch / GROUP)
    g = (
        x.view(groups, batch // groups, width, tokens)
        .transpose(0, 1)
        .reshape(batch // groups, groups * width, tokens)
    )
    g = nn_f.batch_norm(g, None, None, training=True, eps=1e-5)
    g = g.view(batch // groups, groups, width, tokens).transpose(0, 1).reshape(batch, width, tokens)
    return g * scale + bias


def _as4(t: torch.Tensor) -> torch.Tensor:
    return t.view(-1, 1, 1, 1)


def trigflow_network(
    network: nn.Module, u: torch.Tensor, t: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Return (F, logvar) of the unit-scale state u and the angle t."""
    t_fm = torch.sin(t) / (torch.cos(t) + torch.sin(t))
    s = _as4(t_fm)
    norm = torch.sqrt(s * s + (1 - s) ** 2)
    x = u * norm
    v, logvar, _ = network(x, t_fm, *args, **options)
    return ((1 - 2 * s) * x + (1 - 2 * s + 2 * s * s) * v.float()) / norm, logvar


def interpolate(x0: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the TrigFlow path."""
    return torch.cos(_as4(t)) * x0 + torch.sin(_as4(t)) * z


class Pair:
    """Networks, optimizers and the two steps."""

    def __init__(
        self,
        c: config.Config,
        *,
        teacher: Network,
        student: Network,
        heads: nn.ModuleList,
        null_text: torch.Tensor,
        choice: Choice,
    ) -> None:
        """Create the optimizers. A bfloat16 config uses autocast around float32 weights."""
        self.phase = c.phases["sprint"]
        self.c: Any = self.phase.objective
        self.teacher, self.student, self.heads = teacher, student, heads
        self.null_text, self.step = null_text, 0
        self.autocast: Callable = contextlib.nullcontext
        if c.model.dtype == "bfloat16":
            self.autocast = lambda: torch.autocast(null_text.device.type, torch.bfloat16)
        self.set(choice)
        self.trained = [p for p in student.parameters() if p.requires_grad]
        adamw = lambda params, o: torch.optim.AdamW(
            list(params),
            lr=o.lr,
            betas=(o.b1, o.b2),
            eps=1e-8,
            weight_decay=o.weight_decay,
            fused=True,
        )
        self.optimizer = adamw(self.trained, c.phases["sprint"].optimizers["student"])
        self.heads_optimizer = adamw(heads.parameters(), c.phases["sprint"].optimizers["heads"])
        self.ema = [p.detach().clone() for p in self.trained] if c.phases["sprint"].ema else None

    def set(self, choice: Choice) -> None:
        """Switch to another implementation."""
        self.choice = choice
        self.teacher.attention.fused = choice.fused_attention

    def _guidance(self, n, like):
        scales = torch.tensor(self.c.guidance, device=like.device)
        return scales[torch.randint(len(scales), (n,), device=like.device)]

    def _time(self, n, like, mean, std):
        return torch.atan(torch.exp(mean + std * torch.randn(n, device=like.device)) / SIGMA_D)

    def _start(self, x0):
        t = self._time(len(x0), x0, self.c.p_mean, self.c.p_std)
        t = torch.where(torch.rand_like(t) < self.c.max_time, trigflow.T_MAX, t)
        return {"t": t, "z": SIGMA_D * torch.randn_like(x0)}

    def _renoising(self, x0):
        t = self._time(len(x0), x0, self.c.disc_mean, self.c.disc_std)
        return {"t": t, "z": SIGMA_D * torch.randn_like(x0)}

    def draw_generator(self, x0: torch.Tensor) -> dict[str, Any]:
        """Draw the random values of a generator step."""
        c = self.c
        return {
            "w": self._guidance(len(x0), x0),
            "t": self._time(len(x0), x0, c.p_mean, c.p_std),
            "z": SIGMA_D * torch.randn_like(x0),
            "start": self._start(x0),
            "renoise": self._renoising(x0),
        }

    def draw_discriminator(self, x0: torch.Tensor) -> dict[str, Any]:
        """Draw the random values of a discriminator step."""
        names = "fake", "real", "shift"
        return {"w": self._guidance(len(x0), x0), "start": self._start(x0)} | {
            n: self._renoising(x0) for n in names
        }

    def _velocity(self, xt, t, batch, w):
        """Return dx_t/dt of the guided teacher, with both halves in one call."""
        two = lambda a: torch.cat([a, a])
        text = torch.cat([self.null_text.expand_as(batch["text"]), batch["text"]])
        with torch.no_grad():
            F, _ = trigflow_network(
                self.teacher, two(xt / SIGMA_D), two(t), text, two(batch["mask"])
            )
            uncond, cond = F.chunk(2)
            return SIGMA_D * (uncond + _as4(w) * (cond - uncond))

    def _scm(self, batch, drawn):
        x0, t, c = batch["x0"], drawn["t"], self.c
        xt = interpolate(x0, drawn["z"], t)
        v = self._velocity(xt, t, batch, drawn["w"])
        cos, sin = torch.cos(_as4(t)), torch.sin(_as4(t))
        call = lambda u, t: trigflow_network(
            self.student, u, t, batch["text"], batch["mask"], drawn["w"]
        )
        primals = xt / SIGMA_D, t
        tangents = cos * sin * v / SIGMA_D, (cos * sin).flatten()
        self.student.attention.fused = False
        if self.choice.one_pass:
            F, J, logvar = torch.func.jvp(call, primals, tangents, has_aux=True)
        else:
            with torch.no_grad():
                _, J, _ = torch.func.jvp(call, primals, tangents, has_aux=True)
            self.student.attention.fused = self.choice.fused_attention
            F, logvar = call(*primals)
        F_minus, J = F.detach(), J.detach()
        r = min(1.0, (self.step + 1) / max(1, c.tangent_warmup))
        g = -cos * cos * (SIGMA_D * F_minus - v) - r * (cos * sin * xt + SIGMA_D * J)
        if c.tangent_normalize:
            g = g / (torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True) + 0.1)
        error = (F - (F_minus + g)).square().flatten(1).mean(1)
        return (torch.exp(-logvar) / (SIGMA_D * torch.tan(t)) * error + logvar).mean()

    def _generate(self, batch, start, w):
        xt = interpolate(batch["x0"], start["z"], start["t"])
        self.student.attention.fused = self.choice.fused_attention
        F, _ = trigflow_network(
            self.student, xt / SIGMA_D, start["t"], batch["text"], batch["mask"], w
        )
        return torch.cos(_as4(start["t"])) * xt - torch.sin(_as4(start["t"])) * SIGMA_D * F

    def _features(self, x0, drawn, batch):
        s = drawn["t"]
        u = interpolate(x0, drawn["z"], s) / SIGMA_D
        t_fm = torch.sin(s) / (torch.cos(s) + torch.sin(s))
        x = u * _as4(torch.sqrt(t_fm**2 + (1 - t_fm) ** 2))
        return self.teacher(
            x, t_fm, batch["text"], batch["mask"], features=self.c.head_blocks, velocity=False
        )[2]

    def _discriminate(self, features):
        return [head(f) for head, f in zip(self.heads, features, strict=True)]

    def generator_loss(self, batch: Mapping[str, Any], drawn: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of a generator step."""
        self.heads.eval().requires_grad_(False)
        with self.autocast():
            scm = self._scm(batch, drawn)
            x0 = self._generate(batch, drawn["start"], drawn["w"])
            logits = self._discriminate(self._features(x0, drawn["renoise"], batch))
        adv = -torch.stack([one.float().mean() for one in logits]).mean()
        return self.c.scm_weight * scm + self.c.adv_weight * adv

    def discriminator_loss(
        self, batch: Mapping[str, Any], drawn: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return the loss of a discriminator step."""
        self.heads.train().requires_grad_(True)
        with self.autocast():
            with torch.no_grad():
                x0 = self._generate(batch, drawn["start"], drawn["w"])
                shifted = torch.roll(batch["x0"], 1, 0)
                sides = {n: torch.cat([drawn["fake"][n], drawn["shift"][n]]) for n in ("t", "z")}
                twice = {n: torch.cat([batch[n], batch[n]]) for n in ("text", "mask")}
                fakes = self._features(torch.cat([x0, shifted]), sides, twice)
                reals = self._features(batch["x0"], drawn["real"], batch)
            fake, real = self._discriminate(fakes), self._discriminate(reals)
        over_heads = lambda logits, f: torch.stack([f(one.float()).mean() for one in logits]).mean()
        return 0.5 * (
            over_heads(real, lambda d: nn_f.relu(1 - d))
            + over_heads(fake, lambda d: nn_f.relu(1 + d))
        )

    def _update(self, loss, parameters, optimizer, clip):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if torch.isfinite(norm):
            optimizer.step()
        self.step += 1
        return norm

    def generator_step(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Update the student and return the loss."""
        loss = self.generator_loss(batch, self.draw_generator(batch["x0"]))
        self._update(loss, self.trained, self.optimizer, self.phase.optimizers["student"].clip)
        if self.ema is not None:
            with torch.no_grad():
                torch._foreach_lerp_(
                    self.ema, [p.detach() for p in self.trained], 1 - self.phase.ema
                )
        return loss.detach()

    def discriminator_step(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Update the heads and return the loss."""
        loss = self.discriminator_loss(batch, self.draw_discriminator(batch["x0"]))
        self._update(
            loss,
            list(self.heads.parameters()),
            self.heads_optimizer,
            self.phase.optimizers["heads"].clip,
        )
        return loss.detach()


def _network(model, params, on, trained):
    plain = dataclasses.replace(model, logvar_head=False)
    params = jax.tree.map(np.asarray, params)
    logvar, inputs = None, dict(params["inputs"])
    if model.logvar_head:
        head = inputs.pop("logvar")
        logvar = nn.Linear(model.width, 1)
        with torch.no_grad():
            logvar.weight.copy_(torch.from_numpy(head["kernel"].T.copy()))
            logvar.bias.copy_(torch.from_numpy(head["bias"].copy()))
        logvar.to(on)
    sana = peers.filled(
        peers.sana(plain), tables.transformer(plain), params | {"inputs": inputs}, on
    )
    return Network(sana, logvar).requires_grad_(trained)


def _head(width, params, spectral):
    """Return a head with our parameters and singular vectors, in NumPy."""
    head = Head(width)
    with torch.no_grad():
        for name in ("conv_in", "conv_mid", "conv_out"):
            layer = getattr(head, name)
            taps = layer.kernel_size[0]
            kernel = params[name]["kernel"].reshape(taps, width, -1).transpose(2, 1, 0)
            layer.weight.copy_(torch.from_numpy(kernel.copy()))
            layer.bias.copy_(torch.from_numpy(params[name]["bias"].copy()))
        for name in ("norm_in", "norm_mid"):
            getattr(head, f"{name}_scale").copy_(
                torch.from_numpy(params[name]["scale"].copy())[:, None]
            )
            getattr(head, f"{name}_bias").copy_(
                torch.from_numpy(params[name]["bias"].copy())[:, None]
            )
        head.normed()
        for name, vectors in spectral.items():
            layer = getattr(head, name)
            found = layer.parametrizations.weight[0]
            found._u.copy_(torch.from_numpy(vectors["u"].copy()))
            # PyTorch's order has taps last.
            v = vectors["v"].reshape(layer.kernel_size[0], width).T.reshape(-1)
            found._v.copy_(torch.from_numpy(v.copy()))
    return head


def of_ours(
    c: config.Config,
    frozen: Any,
    state: Any,
    choice: Choice,
    on: torch.device = torch.device("cpu"),
) -> Pair:
    """Return a Pair with the weights of a training state."""
    one = lambda tree, i: jax.tree.map(lambda a: np.asarray(a)[i], tree)
    student, heads = state.roles["student"], state.roles["heads"]
    objective: Any = c.phases["sprint"].objective
    torch_heads = [
        _head(c.model.width, one(heads.params, i), one(heads.extra["real"], i))
        for i in range(len(objective.head_blocks))
    ]
    return Pair(
        c,
        teacher=_network(build.teacher(c), frozen.teacher, on, False),
        student=_network(build.student(c), student.params, on, True),
        heads=nn.ModuleList(torch_heads).to(on),
        null_text=peers.tensor(frozen.null_text, on),
        choice=choice,
    )


def batch_of_ours(
    batch: Mapping[str, Any], on: torch.device = torch.device("cpu")
) -> dict[str, torch.Tensor]:
    """Return {"x0" [B, C, H, W] at scale sigma_d, "text", "mask"} of a batch of our steps."""
    return {
        "x0": SIGMA_D * peers.nchw(batch["latent"], on),
        "text": peers.tensor(batch["text"], on),
        "mask": peers.tensor(batch["mask"], on),
    }


def draws_of_ours(c: config.Config, step: int, x0: np.ndarray, name: str) -> dict[str, Any]:
    """Return what a step of ours draws for x0 (NHWC).

    step: its number. name: "generator" or "discriminator".
    """
    s: Any = c.phases["sprint"].objective
    n = x0.shape[0]
    seed = c.seed + c.phases["sprint"].seed
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 7)
    noise = lambda key: SIGMA_D * jax.random.normal(key, x0.shape)
    choice = lambda key: jax.random.choice(key, np.asarray(s.guidance, np.float32), (n,))

    def renoising(key):
        k_time, k_noise = jax.random.split(key)
        return {
            "t": trigflow.sample_time(k_time, n, mean=s.disc_mean, std=s.disc_std),
            "z": noise(k_noise),
        }

    t = trigflow.sample_time(keys[4], n, mean=s.p_mean, std=s.p_std)
    drawn = {
        "w": choice(keys[0]),
        "start": {"t": trigflow.with_max_time(keys[5], t, s.max_time), "z": noise(keys[6])},
    }
    if name == "generator":
        drawn |= {
            "t": trigflow.sample_time(keys[1], n, mean=s.p_mean, std=s.p_std),
            "z": noise(keys[2]),
        }
        drawn["renoise"] = renoising(keys[3])
    else:
        drawn |= {
            side: renoising(key)
            for side, key in zip(("fake", "real", "shift"), keys[1:4], strict=True)
        }
    return drawn


def to_torch(drawn: Any, on: torch.device = torch.device("cpu")) -> Any:
    """Copy draws to tensors, images to NCHW."""
    return jax.tree.map(lambda a: peers.nchw(a, on) if a.ndim == 4 else peers.tensor(a, on), drawn)


def _seconds(pair, choice, batch, wait):
    """Return the seconds of a generator step with a choice, infinity if memory is too small."""
    pair.set(choice)
    took = math.inf
    try:
        for _ in range(2):
            took = peers.seconds(lambda: pair.generator_step(batch), wait)
    except torch.OutOfMemoryError:
        machine.collect()
        return math.inf
    return took


def program(
    bench: bench_lib.Bench,
    c: config.Config,
    frozen: Any,
    state: Any,
    batch: Mapping[str, Any],
) -> timing.Program:
    """Return both steps on `batch`, in the fastest of CHOICES.

    Raises:
      NoPeer: for a config that only our steps implement.
    """
    phase = c.phases["sprint"]
    published = dict(
        weighting="code",
        logvar_gradient="network",
        reduction="code",
        uncond_mask="cond",
        misaligned=True,
    )
    same = all(getattr(phase.objective, name) == value for name, value in published.items())
    if phase.accumulate != 1 or not same:
        raise bench_lib.NoPeer("no peer: benchmarks/torch_pair.py has only the published losses")
    on = peers.device(bench)
    ours = batch_of_ours(batch, on)
    pair = of_ours(c, frozen, state, CHOICES[0], on)
    wait = peers.waiting(on)
    seconds = [_seconds(pair, choice, ours, wait) for choice in CHOICES]
    if min(seconds) == math.inf:
        raise torch.OutOfMemoryError(
            "a generator step does not fit this device's memory with any choice"
        )
    chosen = CHOICES[int(np.argmin(seconds))]
    pair.set(chosen)

    def losses():
        fresh = of_ours(c, frozen, state, chosen, on)
        x0 = np.asarray(batch["latent"])
        drawn = [
            to_torch(draws_of_ours(c, int(state.step), x0, name), on)
            for name in ("generator", "discriminator")
        ]
        return np.array(
            [
                fresh.generator_loss(ours, drawn[0]).item(),
                fresh.discriminator_loss(ours, drawn[1]).item(),
            ]
        )

    calls = {
        "generator": timing.Call(lambda: pair.generator_step(ours), wait),
        "discriminator": timing.Call(lambda: pair.discriminator_step(ours), wait),
    }
    return timing.Program(calls, losses, note=str(chosen))
