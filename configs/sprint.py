"""Few-step students end to end: the embedded data, and the published recipes.

    python -m sprint_jax.main --config=configs/sprint.py            the default, `shapes`
    python -m sprint_jax.main --config=configs/sprint.py:sprint     SANA-Sprint on the same data
    python -m sprint_jax.main --config=configs/sprint.py:smoke      every phase in a minute

Presets
  shapes          2 CPU cores. Makes a 1-4 step student of the shipped teacher by regression on its
                  rollouts, then by repair of what blends in one step, and scores both.
  sprint          The same teacher and data by SANA-Sprint: sCM + LADD.
  dmd             The default, then distribution matching with its anchor kept on.
  dmd2, rcm       From the teacher: distribution matching with heads, and beside consistency.
  proxy_reward, policy
                  The default, then trained on the metric: by the embedded checker's verdicts of
                  images of training captions. Their scores are no measurement of anything else.
  shapes_teacher  The recipe of the shipped teacher: trains it from nothing, then as `shapes`.
  smoke           Teacher and SANA-Sprint, cut down to seconds.
  shapes_64       SANA-Sprint at 64 px with a larger network, whose teacher it trains first: an
                  hour and a half on two CPU cores.
  emoji           SANA-Sprint on captioned emoji at 64 px, read from a folder that
                  `sprint-jax encode` made.
  sana_600m_tbcm  Prompts alone, no images: TBCM on rollouts of a published teacher. Give a file of
                  prompts, the folder with the text encoder and the teacher:

    python -m sprint_jax.main --config=configs/sprint.py:sana_600m_tbcm \\
        --config.data.prompts=PROMPTS.txt --config.data.model=SANA_SPRINT_FOLDER \\
        --config.teacher.pretrained=TEACHER_FOLDER --workdir=SHARED_DIR

  sana_600m_cmt   The same after 5 000 updates of CMT, which bring a teacher near its student first.
  sana_600m_rcm   As sana_600m by rCM: distribution matching in the place of the heads. Its times
                  are those of rCM's paper; rates and updates of the critic are first guesses, and
                  nobody has trained it here.
  sana_600m, sana_1600m
                  The paper's second phase: 20 000 updates of 512 samples, alternating between
                  generator and discriminator. It needs a teacher of that size (published, or
                  trained with configs/teacher.py) and encoded data:

    python -m sprint_jax encode --source=PICTURES --encoder=SANA_SPRINT_FOLDER \\
        --encoded=data/sana --sizes=published --heldout=2000
    python -m sprint_jax.main --config=configs/sprint.py:sana_600m \\
        --config.data.encoded=data/sana --config.data.model=SANA_SPRINT_FOLDER \\
        --config.teacher.pretrained=TEACHER_FOLDER --workdir=SHARED_DIR

The evaluation needs 64 held-out images of 1024 x 1024, hence --heldout. Hardware, hours and memory
are predicted, before anything is started, by

    python -m sprint_jax plan --config=configs/sprint.py:sana_600m --topology=h200:8x8

By its arithmetic 20 000 updates take 28 H200 hours (600M) and 82 (1600M) at full speed, 69 and 205
at 40 % of it; docs/results/plan.md has the tables.

Any key can be changed on the command line: --config.phases.repair.steps=400. docs/results/ has the
measured results.
"""

from typing import Any

import ml_collections

from sprint_jax.errors import UserError

PRESETS = (
    "shapes",
    "sprint",
    "dmd",
    "dmd2",
    "rcm",
    "proxy_reward",
    "policy",
    "shapes_teacher",
    "smoke",
    "shapes_64",
    "emoji",
    "sana_600m",
    "sana_1600m",
    "sana_600m_tbcm",
    "sana_600m_cmt",
    "sana_600m_rcm",
)


def get_config(preset: str = "shapes") -> Any:
    """Return the card of a preset. Raises UserError for an unknown one."""
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
    if preset == "sana_600m_rcm":
        return _sana_rcm()
    if preset.startswith("sana_"):
        return _sana_prompts(preset) if preset.count("_") > 1 else sana(preset)
    config = _embedded()
    match preset:
        case "shapes":
            follow_rollouts(config)
        case "dmd":
            follow_rollouts(config)
            _match_after(config)
        case "proxy_reward" | "policy":
            follow_rollouts(config)
            _judge_after(config, preset)
        case "dmd2" | "rcm":
            _match(config, preset)
        case "shapes_teacher":
            config.teacher.pretrained = ""
            follow_rollouts(config)
        case "smoke":
            _smoke(config)
        case "shapes_64":
            _shapes_64(config)
        case "emoji":
            _emoji(config)
    return config


def _embedded() -> Any:
    """Return SANA-Sprint on the embedded data."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = dict(
        encoded="", prompts="", model="", size=32, seed=0, eval_seed=1, workers=0, max_bad=0.01
    )
    config.text = dict(vocabulary="shapes", length=16, dim=224)
    config.codec = dict(block=8, scale=1.237, weights="package:shapes_codec", channels=32)
    config.model = dict(
        width=128,
        depth=7,
        heads=4,
        cross_heads=4,
        mlp_ratio=2.0,
        patch_size=1,
        qk_norm=True,
        time_scale=1.0,
        guidance_embed=True,
        guidance_scale_factor=0.1,
        target_embed=False,
        remat="none",
        unroll=7,
        dtype="float32",
        residual_dtype="float32",
        attention="plain",
    )
    config.mesh = dict(data=-1, fsdp=1)
    config.teacher = dict(
        pretrained="package:shapes_teacher", start="", base_qk_norm=True, base_time_scale=1.0
    )
    config.control = dict(depth=0, condition="edges", pretrained="", freehand=0.0)
    config.order = ("teacher", "finetune", "control", "sprint")
    config.phases = dict(
        teacher=dict(
            network="base",
            seed=0,
            steps=10000,
            batch=64,
            accumulate=1,
            ema=0.998,
            optimizers=dict(network=_muon(lr=2e-3, muon_lr=0.02, warmup=100, decay_to=0.02)),
            objective=_flow_matching(border_start=True),
        ),
        finetune=dict(
            network="teacher",
            seed=0,
            steps=0,
            batch=64,
            accumulate=1,
            ema=0.998,
            optimizers=dict(network=_muon(lr=3e-4, muon_lr=0.003, warmup=100, decay_to=0.02)),
            objective=_flow_matching(border_start=False),
        ),
        control=dict(
            network="control",
            seed=2,
            steps=0,
            batch=64,
            accumulate=1,
            ema=0.998,
            optimizers=dict(network=_muon(lr=2e-3, muon_lr=0.02, warmup=50, decay_to=0.05)),
            objective=_flow_matching(border_start=False),
        ),
        sprint=dict(
            network="student",
            seed=1,
            steps=2400,
            batch=32,
            accumulate=1,
            ema=0.99,
            optimizers=dict(
                student=_muon(lr=2e-4, muon_lr=0.005, warmup=20, b1=0.0, weight_decay=0.0, clip=0.5)
                | dict(decay_to=0.1),
                heads=_adamw(lr=5e-4, warmup=0, decay_to=1.0),
            ),
            objective=dict(
                kind="scm_ladd",
                guidance=(1.25, 1.5, 2.0),
                uncond_mask="cond",
                control_dropout=0.1,
                p_mean=-0.4,
                p_std=1.4,
                tangent_warmup=300,
                tangent_normalize=True,
                weighting="code",
                logvar_gradient="head",
                logvar_start=0.0,
                scm_weight=1.0,
                adv_weight=5.0,
                max_time=0.7,
                disc_mean=-0.6,
                disc_std=1.0,
                reduction="code",
                misaligned=True,
                heads_loss="hinge",
                head_blocks=(0, 2, 4, 6),
            ),
        ),
    )
    config.evaluation = dict(
        prompts=256,
        split="heldout",
        batch=64,
        teacher_steps=20,
        teacher_guidance=1.5,
        student_guidance=1.5,
        schedule="code",
        diversity=0,
        reference=1024,
        samples=48,
    )
    config.run = dict(
        log_every=20,
        checkpoint_every=200,
        preview_every=200,
        keep=2,
        max_rejected=10,
        quick_compile=False,
    )
    return config


def rollouts(**values: Any) -> dict[str, Any]:
    """Return settings of objectives on rollouts of the embedded teacher."""
    return dict(
        guidance=(1.5,),
        uncond_mask="cond",
        control_dropout=0.1,
        logvar_start=0.0,
        stored=8192,
        route_steps=8,
        route_order=2,
        route_shift=2.0,
        distance_c=0.1,
    ) | dict(values)


def follow_rollouts(config: Any) -> None:
    """Replace SANA-Sprint by regression on the teacher's rollouts, and repair of its blends."""
    student = config.phases.sprint.optimizers.student.to_dict()
    phase = dict(network="student", batch=64, accumulate=1, ema=0.99)
    regression = dict(kind="regression", from_noise=0.7)
    repair = dict(
        kind="repair",
        from_noise=0.6,
        hops=1,
        hop_from=(0.6, 0.8),
        hop_ratio=0.5,
        hop_steps=1,
        tries=2,
        hop_c=0.03,
        anchor_share=0.5,
        anchor_weight=3.0,
        anchor_trim=0.1,
    )
    del config.phases.sprint
    config.phases.regression = phase | dict(
        seed=1,
        steps=400,
        optimizers=dict(student=dict(student)),
        objective=rollouts(**regression),
    )
    config.phases.repair = phase | dict(
        seed=2,
        steps=500,
        batch=48,
        ema=0.995,
        optimizers=dict(student=dict(student)),
        objective=rollouts(**repair),
    )
    config.order = ("teacher", "finetune", "control", "regression", "repair")
    config.evaluation.update(prompts=768, split="final", diversity=64)


def matching(**values: Any) -> dict[str, Any]:
    """Return settings of distribution matching on the embedded data."""
    return dict(
        sample_steps=1,
        sampler_times=0.5,
        renoise_mean=-0.69,
        renoise_std=1.6,
        dmd_normalize=True,
        dmd_guidance="coupled",
        critic_updates=3,
        critic_pull=1.0,
        dmd_weight=1.0,
    ) | dict(values)


def _match_after(config):
    """Add a phase of distribution matching, whose critic begins as the student, after repair."""
    student = config.phases.repair.optimizers.student.to_dict()
    anchor = _anchor(config)
    config.phases.dmd = dict(
        network="student",
        seed=3,
        steps=240,
        batch=32,
        accumulate=1,
        ema=0.98,
        optimizers=dict(
            student=student | dict(lr=4e-5, muon_lr=0.001, warmup=10),
            fake=student | dict(warmup=10, decay_to=1.0),
        ),
        objective=anchor | matching(kind="dmd") | dict(anchor_weight=0.3),
    )
    config.order = (*config.order, "dmd")


def _anchor(config):
    """Return the settings of repair's anchor."""
    repair = config.phases.repair.objective.to_dict()
    others = ("kind", "hops", "hop_from", "hop_ratio", "hop_steps", "hop_c", "tries")
    return {name: value for name, value in repair.items() if name not in others}


def _judge_after(config, kind):
    """Add a phase of reward by the embedded checker after repair."""
    student = config.phases.repair.optimizers.student.to_dict()
    student |= dict(lr=4e-5, muon_lr=0.001, warmup=10)
    optimizers = dict(student=student)
    own = dict(kind=kind, reward="sprint_jax.toy.checker:reward", reward_weight=0.1)
    own |= dict(stored=0, anchor_share=0.25, anchor_weight=1.0)
    if kind == "proxy_reward":
        own |= dict(disc_mean=-1.5, disc_std=0.5, reduction="code", misaligned=True)
        own |= dict(heads_loss="softplus", head_blocks=(0, 2, 4, 6))
        optimizers["proxy"] = _adamw(lr=5e-4, warmup=0, decay_to=1.0)
    else:
        own |= dict(preference="advantage", group=4, beta=0.1)
    config.phases[kind] = dict(
        network="student",
        seed=4,
        steps=400,
        batch=32,
        accumulate=1,
        ema=0.98,
        optimizers=optimizers,
        objective=_anchor(config) | own,
    )
    config.order = (*config.order, kind)


def _match(config, kind):
    """Replace SANA-Sprint by DMD2 or rCM, from the teacher."""
    sprint = config.phases.sprint
    old = sprint.objective.to_dict()
    names = ("guidance", "uncond_mask", "control_dropout", "logvar_start")
    student, heads = sprint.optimizers.student.to_dict(), sprint.optimizers.heads.to_dict()
    phase = {n: sprint[n] for n in ("network", "seed", "batch", "accumulate", "ema")}
    fake = student | dict(decay_to=1.0)
    if kind == "dmd2":
        names += ("disc_mean", "disc_std", "reduction", "misaligned", "head_blocks")
        own = matching(kind="dmd2", sample_steps=2)
        own |= dict(adv_weight=1.0, heads_loss="softplus", divergence="reverse_kl")
        optimizers = dict(student=student, heads=heads, fake=fake)
    else:
        names += ("p_mean", "p_std", "tangent_warmup", "tangent_normalize", "weighting")
        names += ("logvar_gradient",)
        own = matching(kind="rcm", sample_steps=2, critic_updates=1)
        own |= dict(dmd_balance="gradient", dmd_start=300)
        optimizers = dict(student=student, fake=fake)
    config.phases[kind] = phase | dict(
        steps=2400, optimizers=optimizers, objective={n: old[n] for n in names} | own
    )
    del config.phases.sprint
    config.order = ("teacher", "finetune", "control", kind)
    config.evaluation.update(prompts=768, split="final", diversity=64)


def _adamw(**values):
    """Return AdamW's settings for the discriminator's heads."""
    base = dict(kind="adamw", muon_lr=0.0, reference_batch=0, b1=0.0, b2=0.99, b3=0.0)
    return base | dict(weight_decay=0.0, clip=0.5, frozen=()) | values


def _muon(**values):
    """Return Muon's settings for the embedded teachers."""
    base = dict(kind="muon", reference_batch=0, b1=0.9, b2=0.99, b3=0.0)
    return base | dict(weight_decay=0.01, clip=1.0, frozen=()) | values


def _flow_matching(**values):
    """Return settings of flow matching on the embedded data."""
    times = dict(time_mean=0.0, time_std=1.0, time_shift=3.0)
    return dict(kind="flow_matching", caption_dropout=0.1) | times | values


def _smoke(config):
    config.model.update(width=32, depth=2, heads=2, cross_heads=2, unroll=1)
    config.teacher.pretrained = ""
    for name in ("teacher", "finetune"):
        config.phases[name].batch = 8
    config.phases.teacher.steps = 12
    config.phases.sprint.update(steps=12, batch=8)
    config.phases.sprint.objective.update(tangent_warmup=6, head_blocks=(0, 1))
    config.evaluation.update(prompts=16, batch=16, reference=64, samples=16)
    config.run.update(log_every=2, checkpoint_every=4, preview_every=6, quick_compile=True)


def _shapes_64(config):
    """Cut 64 px images into patches of 16 px: 16 tokens as in the default, of more channels.

    Larger images cost no more tokens, as with DC-AE.
    """
    config.data.size = 64
    config.codec.update(block=16, scale=1.049, weights="package:shapes_64_codec", channels=48)
    config.model.update(width=192, depth=8, heads=6, cross_heads=3, mlp_ratio=2.5, unroll=8)
    config.teacher.pretrained = ""
    config.phases.teacher.steps = 3600
    config.phases.sprint.steps = 3600
    config.phases.sprint.objective.head_blocks = (1, 3, 5, 7)


def _emoji(config):
    """Train on captioned emoji. Two commands make the folder: see docs/guide/own-data.md."""
    config.data.update(encoded="data/emoji", size=64)
    config.text.update(vocabulary="words", length=24)
    config.codec.update(block=8, scale=1.437, weights="package:emoji_codec", channels=64)
    config.model.update(width=192, depth=8, heads=6, cross_heads=6, mlp_ratio=2.5, unroll=8)
    config.teacher.pretrained = ""
    config.phases.teacher.update(steps=4000, batch=32)
    config.phases.sprint.update(steps=1600, batch=16)
    # logvar_gradient and max_time are those that its published results were made with.
    config.phases.sprint.objective.update(
        guidance=(1.5, 2.0, 2.5),
        head_blocks=(1, 3, 5, 7),
        logvar_gradient="network",
        max_time=0.5,
    )
    config.evaluation.update(
        prompts=64, batch=32, teacher_guidance=2.0, student_guidance=2.0, reference=256
    )
    config.run.update(checkpoint_every=200)


def sana(preset: str) -> Any:
    """Return the published recipe.

    It is that of the paper's appendix. Where the appendix is silent or differs, it is that of the
    released trainer.

    Rates: CAME at 2e-6, which the released trainer multiplies by sqrt(512 / 256), for both
    networks. Warm-up: 156 updates. The released file says 5000 scheduler steps, and its 32
    processes take 32 of them for each update. H, and `steps`, count generator and discriminator
    updates together.
    """
    config = ml_collections.ConfigDict()
    config.seed = 42
    config.data = dict(
        encoded="data/sana",
        prompts="",
        model="",
        size=1024,
        seed=42,
        eval_seed=0,
        workers=8,
        max_bad=0.01,
    )
    config.text = dict(vocabulary="gemma", length=300, dim=2304)
    config.codec = dict(block=32, scale=0.41407, weights="", channels=32)
    size = dict(width=1152, depth=28, heads=36, cross_heads=16)
    if preset == "sana_1600m":
        size = dict(width=2240, depth=20, heads=70, cross_heads=20)
    config.model = dict(
        **size,
        mlp_ratio=2.5,
        patch_size=1,
        qk_norm=True,
        time_scale=1.0,
        guidance_embed=True,
        guidance_scale_factor=0.1,
        target_embed=False,
        remat="block",
        unroll=1,
        dtype="bfloat16",
        residual_dtype="float32",
        attention="plain",
    )
    config.mesh = dict(data=-1, fsdp=8)
    config.teacher = dict(
        pretrained="models/teacher", start="", base_qk_norm=True, base_time_scale=1.0
    )
    config.control = dict(depth=0, condition="hed", pretrained="", freehand=0.0)
    shift = 4.0 if preset == "sana_600m" else 3.0
    config.order = ("teacher", "finetune", "control", "sprint")
    config.phases = dict(
        teacher=_sana_flow("base", 0, 1024, came(lr=2e-5, reference_batch=0, warmup=2000), shift),
        finetune=_sana_flow(
            "teacher", 0, 1024, came(lr=2e-5, reference_batch=0, warmup=2000), shift
        ),
        # See configs/controlnet.py.
        control=_sana_flow("control", 2, 16, came(lr=1e-4, reference_batch=256, warmup=30), shift),
        sprint=dict(
            network="student",
            seed=1,
            steps=20000,
            batch=512,
            accumulate=1,
            ema=0.0,
            optimizers=dict(
                student=came(lr=2e-6, reference_batch=256, warmup=156),
                heads=came(lr=2e-6, reference_batch=256, warmup=0),
            ),
            objective=dict(
                kind="scm_ladd",
                guidance=(4.0, 4.5, 5.0),
                uncond_mask="cond",
                control_dropout=0.0,
                p_mean=0.2,
                p_std=1.6,
                tangent_warmup=4000,
                tangent_normalize=True,
                weighting="code",
                logvar_gradient="network",
                logvar_start=0.0,
                scm_weight=1.0,
                adv_weight=0.5,
                max_time=0.5,
                disc_mean=-0.6,
                disc_std=1.0,
                reduction="code",
                misaligned=True,
                heads_loss="hinge",
                head_blocks=(2, 8, 14, 19),
            ),
        ),
    )
    config.evaluation = dict(
        prompts=64,
        split="heldout",
        batch=4,
        teacher_steps=20,
        teacher_guidance=4.5,
        student_guidance=4.5,
        schedule="code",
        diversity=0,
        reference=64,
        samples=64,
    )
    # No previews: process 0 would hold the whole student on one device beside its share of the
    # training state.
    config.run = dict(
        log_every=20,
        checkpoint_every=500,
        preview_every=0,
        keep=3,
        max_rejected=100,
        quick_compile=False,
    )
    return config


def _sana_rcm():
    """Return rCM at the published size, from a published SANA with QK-norm."""
    config = sana("sana_600m")
    sprint = config.phases.sprint
    old = sprint.objective.to_dict()
    kept = ("guidance", "uncond_mask", "control_dropout", "logvar_start", "tangent_warmup")
    kept += ("tangent_normalize", "weighting", "logvar_gradient")
    adam = came(kind="adamw", reference_batch=0, warmup=500, b1=0.0, b2=0.999, weight_decay=0.01)
    own = matching(kind="rcm", sample_steps=2, critic_updates=1, critic_pull=0.98)
    own |= dict(p_mean=-1.49, p_std=1.6, dmd_balance="gradient", dmd_start=0)
    config.phases.rcm = dict(
        network="student",
        seed=1,
        steps=20000,
        batch=512,
        accumulate=1,
        ema=0.999,
        optimizers=dict(student=adam | dict(lr=1e-6), fake=adam | dict(lr=4e-6)),
        objective={name: old[name] for name in kept} | own,
    )
    del config.phases.sprint
    config.order = ("teacher", "finetune", "control", "rcm")
    return config


def _sana_prompts(preset):
    """Return TBCM at the published size, as in its released file, perhaps after CMT.

    Rates, warm-up and times are those of the released 600M file: one prompt on each of 32 devices,
    15 states each. CMT is this project's choice.
    """
    config = sana("sana_600m")
    config.data.update(encoded="", prompts="prompts.txt", model="models/sana_sprint", workers=0)
    sprint = config.phases.sprint.objective
    shared = dict(
        guidance=sprint.guidance,
        uncond_mask="cond",
        control_dropout=0.0,
        logvar_start=0.0,
        route_steps=16,
    )
    phase = dict(network="student", batch=32, accumulate=1, ema=0.0)
    student = came(lr=1e-5, reference_batch=0, warmup=5000)
    tbcm = dict(
        kind="tbcm",
        route_order=1,
        route_shift=2.5,
        route_jitter=True,
        tangent_warmup=4000,
        tangent_final=0.75,
        tangent_final_start=15000,
        tangent_final_steps=2000,
        tangent_normalize=True,
        weighting="code",
        logvar_gradient="network",
    )
    cmt = dict(
        kind="cmt",
        stored=0,
        route_order=2,
        route_shift=6.25,
        distance_c=0.03,
        pairs="ends",
    )
    del config.phases.sprint
    config.phases.cmt = phase | dict(
        seed=1,
        steps=5000 if preset == "sana_600m_cmt" else 0,
        optimizers=dict(student=came(lr=1e-5, reference_batch=0, warmup=500)),
        objective=shared | cmt,
    )
    config.phases.tbcm = phase | dict(
        seed=2, steps=20000, optimizers=dict(student=student), objective=shared | tbcm
    )
    config.order = ("teacher", "finetune", "control", "cmt", "tbcm")
    config.evaluation.update(reference=2)
    return config


def came(**values: Any) -> dict[str, Any]:
    """CAME as published.

    AdamW instead: --config.phases.sprint.optimizers.student.kind=adamw
    --config.phases.sprint.optimizers.student.b2=0.95
    """
    return (
        dict(
            kind="came",
            muon_lr=0.0,
            decay_to=1.0,
            b1=0.9,
            b2=0.999,
            b3=0.9999,
            weight_decay=0.0,
            clip=0.1,
            frozen=(),
        )
        | values
    )


def _sana_flow(network, seed, batch, optimizer, shift):
    """Return a phase of flow matching at the published sizes, left out until it has steps."""
    return dict(
        network=network,
        seed=seed,
        steps=0,
        batch=batch,
        accumulate=1,
        ema=0.0,
        optimizers=dict(network=optimizer),
        objective=_flow_matching(border_start=False, time_shift=shift),
    )
