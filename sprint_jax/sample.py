"""Pictures from a trained run: python -m sprint_jax.sample --model=RUN_DIR --prompt="…" --steps=2 --out=DIR"""

import json
import os
import pathlib
import sys
import time

from absl import app, flags

from sprint_jax import cli
from sprint_jax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "Run directory of sprint_jax.main.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be repeated.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Text file with one prompt a line.")
_STEPS = flags.DEFINE_integer("steps", 2, "Network calls per picture, 1 or more.")
_SEED = flags.DEFINE_integer("seed", 0, "Names the noise.")
_OUT = flags.DEFINE_string("out", "pictures", "Directory for the pictures and manifest.jsonl.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Embedded guidance scale; default: the model's.")
_SCHEDULE = flags.DEFINE_enum("schedule", None, ["code", "paper"], "Time list; default: the model's.")


def main(argv):
    with cli.user_errors():
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}: flags look like --name=value")
        if not _MODEL.value:
            raise UserError("--model is missing: give the --workdir of a run of sprint_jax.main")
        if not 0 <= _SEED.value < 2**31:
            raise UserError(f"--seed={_SEED.value}: use 0 to {2**31 - 1}")
        prompts = _read_prompts()
        out = _output_directory()
        from sprint_jax import pictures, pipeline

        begin = time.perf_counter()
        pipe = pipeline.load(_MODEL.value)
        import tqdm

        with tqdm.tqdm(total=len(prompts), unit="picture", desc="sample", delay=5) as bar:
            images = pipeline.generate(
                pipe, prompts, steps=_STEPS.value, guidance_scale=_GUIDANCE.value, seed=_SEED.value,
                schedule=_SCHEDULE.value, say=lambda done: bar.update(done - bar.n),
            )  # fmt: skip
        rows = []
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            name = f"{i:05d}.png"
            pictures.save(out / name, image)
            rows.append({"file": name, "prompt": prompt, "seed": _SEED.value, "steps": _STEPS.value})
        _write_manifest(out, rows)
        seconds = time.perf_counter() - begin
        print(f"{len(rows)} pictures and manifest.jsonl in {out} ({seconds:.1f} s)")


def _read_prompts():
    if bool(_PROMPT.value) == bool(_PROMPTS.value):
        raise UserError("give either --prompt=TEXT (repeatable) or --prompts=FILE")
    if _PROMPT.value:
        return _PROMPT.value
    try:
        lines = pathlib.Path(_PROMPTS.value).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts={_PROMPTS.value} ({error}): give a UTF-8 text file") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={_PROMPTS.value} holds no prompt: write one a line")
    return prompts


def _output_directory():
    out = pathlib.Path(_OUT.value)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in --out={out} ({error.strerror}): choose another") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write in --out={out}: choose another")
    return out


def _write_manifest(out, rows):
    temporary = out / "manifest.jsonl.partial"
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, out / "manifest.jsonl")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
