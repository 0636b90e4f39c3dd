"""TFDS data sets in array_record form as a source of captioned images, read without TensorFlow."""

import pathlib
from typing import Any

from sprint_jax.data import captioned
from sprint_jax.data.captioned import BadExample, Example
from sprint_jax.errors import UserError
from sprint_jax.storage import files

FILES = frozenset({"dataset_info.json", "features.json"})  # present in every TFDS data set


class TfdsSource:
    """The split "train" of a data set that tensorflow_datasets wrote as array_record."""

    def __init__(self, root: pathlib.Path, caption_field: str):
        """Read the description of a data set. Raises UserError unless it can be used."""
        self._root = root
        self._files = sorted(
            (path.name, path.stat().st_size) for path in files.children(root) if path.is_file()
        )
        self._open: Any = None
        import tensorflow_datasets as tfds  # takes seconds

        try:
            info: Any = tfds.builder_from_directory(root).info
            self._name, splits, features = info.name, dict(info.splits), dict(info.features)
        except Exception as error:  # its parsers raise many kinds of errors
            raise UserError(
                f"cannot read the TFDS data set {root} ({error}): build it again"
            ) from None
        if "train" not in splits:
            raise UserError(
                f"the TFDS data set {root} has no split train but {sorted(splits)}: give one that "
                "has it"
            )
        names = (caption_field, "caption", "prompt", "text")
        self._caption_name = next(
            (n for n in names if isinstance(features.get(n), tfds.features.Text)), None
        )
        if not isinstance(features.get("image"), tfds.features.Image) or not self._caption_name:
            raise UserError(
                f"the TFDS data set {root} has the features {sorted(features)}: it needs image and "
                f"one of {names[1:]}"
            )
        if info.file_format.value != "array_record":
            raise UserError(
                f"the records of {root} are {info.file_format.value}: build it as array_record"
            )
        missing = [path.name for path in splits["train"].filepaths if not path.exists()]
        if missing:
            raise UserError(
                f"{missing[0]} is missing from {root}: add it or build the data set again"
            )
        self._length = splits["train"].num_examples

    def _data(self) -> Any:
        """Return the records, opened on first use, so that the source can be pickled before."""
        if self._open is None:
            import tensorflow_datasets as tfds

            builder: Any = tfds.builder_from_directory(self._root)
            self._open = builder.as_data_source(
                split="train", decoders={"image": tfds.decode.SkipDecoding()}
            )
        return self._open

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """Return "NAME:NUMBER"."""
        return f"{self._name}:{index:09d}"

    def __getitem__(self, index: int) -> Example:
        captioned.check_index(index, self)
        try:
            record = self._data()[index]
            image, caption = record["image"], record[self._caption_name]
        except Exception:  # readers of records and of protocol buffers raise their own errors
            raise BadExample("corrupt record") from None
        return Example(self.key(index), image, None, captioned.decode_caption(caption))

    def identity(self) -> str:
        """Return a hash of the names and sizes of the files."""
        return captioned.hash_files("tfds", self._files)
