"""ControlNet: a sketch steers the image. A multi-step ControlNet by flow matching, then its
distillation.

    python -m sprint_jax.main --config=configs/controlnet.py         the embedded data, 2 CPU cores
    python -m sprint_jax.main --config=configs/controlnet.py:sana_600m ...    the published sizes

Presets
  shapes      Around the shipped teacher: a ControlNet of its first three blocks learns to follow
              edges, then both are distilled by sCM + LADD. A tenth of the samples go without the
              sketch, so the student draws with and without. Half of the examples have their
              objects anywhere and are shown by a rough sketch, as drawn on the page; their images
              stay on the grid, so a drawing is snapped to the nearest clean composition.
  smoke       The same cut down to seconds.
  sana_600m, sana_1600m
              Seven copied blocks and scribbles of HED, as published for the multi-step ControlNet.
              Its rate and warm-up are those of the released files, whose batch of 16 is that of
              one GPU: by the released trainer's rule the rate is
              1e-4 sqrt(phases.control.batch / 256), 2.5e-5 at the 16 of this card. The paper's
              distilled one was never released: its phase is that of configs/sprint.py:sana_600m,
              with the condition given to teacher and student. It needs a teacher with QK-norm
              (configs/teacher.py), at most 16 devices or a larger phases.control.batch, and data
              encoded with the condition:

    python -m sprint_jax encode --source=PICTURES --encoder=SANA_SPRINT_FOLDER \\
        --encoded=data/sketched --condition=scribble --hed_weights=ControlNetHED.pth
    python -m sprint_jax.main --config=configs/controlnet.py:sana_600m \\
        --config.data.encoded=data/sketched --config.data.model=SANA_SPRINT_FOLDER \\
        --config.teacher.pretrained=TEACHER_FOLDER --workdir=SHARED_DIR

Any key can be changed on the command line: --config.phases.control.steps=400.
"""

import math
from typing import Any

from sprint_jax.cards import sprint
from sprint_jax.errors import UserError

PRESETS = ("shapes", "smoke", "sana_600m", "sana_1600m")


def get_config(preset: str = "shapes") -> Any:
    """Return the card of a preset. Raises UserError for an unknown one."""
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
    config = sprint.get_config("sprint" if preset == "shapes" else preset)
    if preset.startswith("sana_"):
        # Steps: the released files train until stopped; 20 000 updates are this project's choice.
        config.control.update(depth=7, condition="scribble")
        config.phases.control.steps = 20000
        return config
    if preset == "smoke":
        config.control.update(depth=1, freehand=0.5)
        config.phases.control.update(steps=8, batch=8)
        return config
    config.control.update(depth=3, freehand=0.5)
    config.phases.control.steps = 600
    # sCM weighed against LADD as by a log-variance that has arrived: errors are below 1 / D for
    # latents of D = 4 x 4 x 32.
    config.phases.sprint.update(steps=1600, batch=16)
    config.phases.sprint.objective.update(
        weighting="paper", logvar_start=-math.log(512), adv_weight=25.0, head_blocks=(1, 3, 5)
    )
    return config
