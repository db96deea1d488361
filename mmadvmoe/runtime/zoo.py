"""The models that come with this package: configs by name, and the weights that there are of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from .safe_load import CheckpointError

_PACKAGE = Path(__file__).resolve().parents[1]
INDEX = 'model-index.yml'


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo.

    Attributes:
        name: As the config is called.
        config: The config file.
        weights: File or address of the weights; None where nobody has published any.
        sha256: Of the file of the weights.
        metadata: What the metafile says of data, cost and training.
        metrics: Measured on the test set with these weights, in percent; empty without weights.
    """

    name: str
    config: Path
    weights: str | None
    sha256: str | None
    metadata: Mapping
    metrics: Mapping[str, float]

    def checked_weights(self) -> str:
        """The file or address of the weights; a file has been compared with its checksum.

        Raises:
            ValueError: There are none.
            CheckpointError: The file is not the one that was published.
        """
        if self.weights is None:
            raise ValueError(
                f'no weights of {self.name!r} are published: train it (python tools/train.py {self.config.name}) and '
                'give the checkpoint as pretrained=PATH, or choose one of list_models(pretrained=True)'
            )
        if '://' not in self.weights:
            path = Path(self.weights)
            if not path.is_file():
                raise CheckpointError(f'the weights {self.weights!r} are missing: install mmadvmoe again')
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != self.sha256:
                raise CheckpointError(
                    f'{self.weights!r} is not the file that was published: its SHA-256 is {found}, that of the zoo '
                    f'{self.sha256}. Install mmadvmoe again'
                )
        return self.weights


def home() -> Path:
    """The folder that holds configs, tools, weights and model index: the checkout, or what an installation brings.

    Raises:
        FileNotFoundError: The package was copied without them.
    """
    for folder in (_PACKAGE.parent, _PACKAGE / '.mim'):
        if (folder / INDEX).is_file() and (folder / 'configs').is_dir():
            return folder
    raise FileNotFoundError(f'there is no {INDEX} beside or in {_PACKAGE}: install mmadvmoe again')


@lru_cache(maxsize=1)
def read_zoo() -> dict[str, ZooModel]:
    """All models by name, as the model index and its metafiles list them."""
    root = home()
    index = yaml.safe_load((root / INDEX).read_text(encoding='utf-8'))
    models = {}
    for metafile in index['Import']:
        for entry in yaml.safe_load((root / metafile).read_text(encoding='utf-8'))['Models']:
            weights = entry.get('Weights')
            if weights is not None and '://' not in weights:
                weights = str(root / weights)
            metrics = entry['Results'][0]['Metrics'] or {}
            name, metadata = entry['Name'], entry['Metadata']
            digest = metadata.get('SHA-256')
            models[name] = ZooModel(name, root / entry['Config'], weights, digest, metadata, metrics)
    return models
