"""Teachers alone: flow matching, with what distillation needs: QK-norm, dense times in [0, 1].

    python -m sprint_jax.main --config=configs/teacher.py         from nothing on the embedded data
    python -m sprint_jax.main --config=configs/teacher.py:sana_600m ...   the paper's first phase

Presets
  shapes      2 CPU cores, some 70 minutes: the recipe of the shipped teacher.
  emoji       Captioned emoji at 64 px, from data that `sprint-jax encode` made.
  sana_600m, sana_1600m
              Fine-tunes a SANA without QK-norm and with times in [0, 1000], as plain flow
              matching: 5 000 updates of 1 024 samples at the paper's rate of 2e-5. By the released
              trainer's rule, sqrt(batch / 256), a file with 2e-5 gives 4e-5:
              --config.phases.finetune.optimizers.network.reference_batch=256. Give the model to
              begin from and the data: --config.teacher.start=SANA_FOLDER
              --config.data.encoded=data/sana. One update is about 3 forward passes of a sample,
              three tenths of a generator's: `sprint-jax plan` has the hours.

The work directory ends with teacher.safetensors:
--config.teacher.pretrained=WORKDIR/teacher.safetensors
"""

from typing import Any

from sprint_jax.cards import sprint
from sprint_jax.errors import UserError

PRESETS = ("shapes", "emoji", "sana_600m", "sana_1600m")


def get_config(preset: str = "shapes") -> Any:
    """Return the card of a preset. Raises UserError for an unknown one."""
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
    config = sprint.get_config(preset)
    config.teacher.pretrained = ""
    for name in config.order:
        if config.phases[name].network == "student":
            config.phases[name].steps = 0
    if preset.startswith("sana_"):
        config.teacher.update(start="models/sana", base_qk_norm=False, base_time_scale=1000.0)
        config.phases.finetune.steps = 5000
        config.run.log_every = 20
    return config
