"""The flag --workdir, shared by the commands that fill a directory of their own."""

from absl import flags

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; default: runs/ and a name that says which."
)
