"""The flags of the commands that make pictures with a model: sprint-jax sample and sprint_jax.commands.evaluate."""

from absl import flags

from sprint_jax.errors import UserError

MODEL = flags.DEFINE_string(
    "model",
    None,
    "Diffusers folder, converted folder, run directory, or (sprint-jax sample alone) an exported file.",
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "File of prompts: text, one a line (sprint-jax evaluate reads others too)."
)
STEPS = flags.DEFINE_integer("steps", 2, "Network calls per picture, 1 or more.")
SEED = flags.DEFINE_integer("seed", 0, "Names the noise.")
OUT = flags.DEFINE_string("out", "pictures", "Directory for the pictures and manifest.jsonl.")
GUIDANCE = flags.DEFINE_float(
    "guidance_scale", None, "Embedded guidance scale; default: the model's."
)
SCHEDULE = flags.DEFINE_enum(
    "schedule", None, ["code", "paper"], "Time list; default: the model's."
)
TIMESTEPS = flags.DEFINE_list(
    "timesteps", None, "Angles from about 1.57 to 0, steps + 1 of them, instead of a schedule."
)
HEIGHT = flags.DEFINE_integer("height", None, "Pixels, a multiple of 32; default: the model's.")
WIDTH = flags.DEFINE_integer("width", None, "Pixels, a multiple of 32; default: the model's.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float32"],
    "Of weights and arithmetic; default: bfloat16, on a CPU float32.",
)
PER_PROMPT = flags.DEFINE_integer("images_per_prompt", 1, "Pictures of each prompt.")
BATCH = flags.DEFINE_integer("batch_size", None, "Pictures made at a time; default: the model's.")
TILE = flags.DEFINE_bool(
    "tile", False, "Decode in overlapping tiles of 1024 px: less memory for large pictures."
)
INSTRUCTION = flags.DEFINE_string(
    "instruction_file",
    None,
    "Text before each prompt of a published model; '' for none; default: see README.",
)


def angles():
    """--timesteps as numbers, or None. Raises UserError where they are none."""
    if TIMESTEPS.value is None:
        return None
    try:
        return [float(angle) for angle in TIMESTEPS.value]
    except ValueError:
        raise UserError(
            f"--timesteps={','.join(TIMESTEPS.value)}: give numbers, for example 1.57,1.0,0"
        ) from None
