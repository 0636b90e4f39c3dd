"""Encode captioned images into a data set to train on.

--encoder is a diffusers or converted folder, or a card, NAME[:PRESET] or FILE.py[:PRESET], for the
embedded encoders of a configuration.

The source is cut into chunks of --shard_records examples. A killed command resumes with the chunks
that are missing, and ends with the same bytes as one that never was. --hosts commands with
--host=0, 1, ... share the chunks; whichever sees the last one done writes manifest.json
(sprint_jax/data/encoded.py has the format). Unusable examples are skipped, counted and listed with
the reason.

For a ControlNet --condition=edges|hed|scribble adds to each example what it is conditioned on:
lines of its image, encoded alike. hed and scribble need --hed_weights=ControlNetHED.pth.
"""

import functools

from sprint_jax.data import encode_options
from sprint_jax.data.encode_options import Options
from sprint_jax.errors import UserError
from sprint_jax.runtime import cards, compile_cache
from sprint_jax.storage import settings


def run(options: Options) -> None:
    """Encode what is missing. Raises UserError for options that do not belong together."""
    encode_options.check(options)
    with settings.folder_claim(options.encoded, "--encoded", f"{options.host}of{options.hosts}"):
        _run(options)


def _run(options):
    from sprint_jax.data import encode, sources
    from sprint_jax.training import data_encoders

    compile_cache.start()
    source = sources.open_source(options.source, options.caption_field)
    if not 0 <= options.heldout < len(source):
        raise UserError(
            f"--heldout={options.heldout} of the {len(source)} examples of "
            f"--source={options.source}: hold out fewer"
        )
    condition = encode_options.condition(options)
    if cards.is_card(options.encoder):
        encoders = data_encoders.of_card(cards.load(options.encoder, flag="encoder"))
    else:
        given = options.encode_dtype, options.pixels_dtype, options.caption_instruction
        encoders = data_encoders.of_folder(options.encoder, *given)
    encode.encode(
        source,
        encoders,
        options.encoded,
        encode.settings(options, source, encoders, condition),
        condition=condition,
        batch=options.encode_batch,
        hosts=options.hosts,
        host=options.host,
        max_bad=options.max_bad_share,
        say=functools.partial(print, flush=True),
    )
